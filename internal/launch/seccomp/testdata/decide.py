#!/usr/bin/env python3
"""Writes libseccomp.txt: what libseccomp makes of profile.json.

Rules are added as runc adds them; the exported program is interpreted for the
system calls that libseccomp knows, with arguments around those of the rules.
Run in this directory, with libseccomp2 installed.
"""
import ctypes, json, os, struct, tempfile

lib = ctypes.CDLL("libseccomp.so.2")
lib.seccomp_init.restype = ctypes.c_void_p
lib.seccomp_syscall_resolve_num_arch.restype = ctypes.c_char_p


class Cmp(ctypes.Structure):
    _fields_ = [("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64)]


OPS = {"SCMP_CMP_NE": 1, "SCMP_CMP_LT": 2, "SCMP_CMP_LE": 3, "SCMP_CMP_EQ": 4, "SCMP_CMP_GE": 5, "SCMP_CMP_GT": 6, "SCMP_CMP_MASKED_EQ": 7}
TOKENS = {"SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_X32": 0x4000003E}


def action(name, errno):
    return {"SCMP_ACT_ALLOW": 0x7FFF0000, "SCMP_ACT_ERRNO": 0x00050000 | (1 if errno is None else errno), "SCMP_ACT_LOG": 0x7FFC0000}[name]


profile = json.load(open("profile.json"))
default = action(profile["defaultAction"], profile.get("defaultErrnoRet"))
ctx = ctypes.c_void_p(lib.seccomp_init(ctypes.c_uint32(default)))
for a in profile["architectures"]:
    rc = lib.seccomp_arch_add(ctx, ctypes.c_uint32(TOKENS[a]))
    assert rc in (0, -17), rc
vals = {0, 1, 0xFFFFFFFF, 1 << 32}
special = set()
for sc in profile["syscalls"]:
    act = action(sc["action"], sc.get("errnoRet"))
    if act == default:
        continue
    for name in sc["names"]:
        nr = lib.seccomp_syscall_resolve_name(name.encode())
        if nr == -1:
            continue
        args = [Cmp(a["index"], OPS[a["op"]], a["value"], a.get("valueTwo", 0)) for a in sc.get("args") or []]
        if args:
            special.add(name)
            for a in args:
                vals |= {a.a, a.b, a.a + 1, a.a | 0x10, a.b | 0x10}
        groups = [args] if len({a.arg for a in args}) == len(args) else [[a] for a in args]
        for g in groups:
            arr = (Cmp * max(len(g), 1))(*g)
            rc = lib.seccomp_rule_add_array(ctx, ctypes.c_uint32(act), nr, len(g), arr)
            assert rc == 0, (name, rc)
f = tempfile.TemporaryFile()
assert lib.seccomp_export_bpf(ctx, f.fileno()) == 0
f.seek(0)
prog = [struct.unpack("=HBBI", c) for c in iter(lambda: f.read(8), b"")]


def run(nr, arch, args):
    data = struct.pack("=IIQ6Q", nr, arch, 0, *args)
    pc = a = 0
    while True:
        code, jt, jf, k = prog[pc]
        pc += 1
        if code == 0x20:
            a = struct.unpack_from("=I", data, k)[0]
        elif code == 0x54:
            a &= k
        elif code == 0x05:
            pc += k
        elif code in (0x15, 0x25, 0x35):
            pc += jt if {0x15: a == k, 0x25: a > k, 0x35: a >= k}[code] else jf
        elif code == 0x06:
            return k
        else:
            raise ValueError(hex(code))


out = open("libseccomp.txt", "w")
for arch in profile["architectures"]:
    audit = 0xC000003E if arch == "SCMP_ARCH_X32" else TOKENS[arch]
    bit = 0x40000000 if arch == "SCMP_ARCH_X32" else 0
    for nr in range(0, 449):
        name = lib.seccomp_syscall_resolve_num_arch(ctypes.c_uint32(TOKENS[arch]), nr | bit)
        if name is None:
            continue
        tries = [(0,) * 6]
        if name.decode() in special or name in (b"socketcall", b"ipc"):
            tries = [tuple(v if i == j else 0 for j in range(6)) for v in sorted(vals) for i in range(3)]
        for args in tries:
            print(hex(audit), hex(nr | bit), *map(hex, args), hex(run(nr | bit, audit, args)), file=out)
