#include "textflag.h"

// tenon_oci_entry is where the kernel starts the program (the linker's -E, see
// the Makefile): in front of Go's own start. The commands that start containers
// have to execute themselves again from a read-only mount (fork.Protect); done
// here, it costs some tenths of a millisecond instead of a whole start of the Go
// runtime. It is a short cut and no more: whatever fails, and whatever it leaves
// out, Go's start follows, and fork.Protect looks at what it finds and does the
// same, or refuses. Keep the two alike.
//
// On entry, as the ABI has it: argc at 0(SP), then argv, nil, envp, nil, auxv.

DATA path<>+0(SB)/8, $"/proc/se"
DATA path<>+8(SB)/8, $"lf/exe\x00\x00"
GLOBL path<>(SB), RODATA|NOPTR, $16

DATA marker<>+0(SB)/8, $"_TENON_P"
DATA marker<>+8(SB)/8, $"ROTECTED"
DATA marker<>+16(SB)/8, $"=1\x00\x00\x00\x00\x00\x00"
GLOBL marker<>(SB), RODATA|NOPTR, $24

#define SYS_prctl 157
#define SYS_close 3
#define SYS_fstatfs 138
#define SYS_execveat 322
#define SYS_open_tree 428
#define SYS_mount_setattr 442

TEXT tenon_oci_entry(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	MOVQ 0(SP), R12             // argc
	LEAQ 8(SP), R13             // argv; what SP was is 8 below
	LEAQ 16(SP)(R12*8), R14     // envp

	// Is any argument one of the commands? One too many costs little.
	XORQ AX, AX

argument:
	INCQ AX
	CMPQ AX, R12
	JGE  start
	MOVQ (R13)(AX*8), SI
	MOVL 0(SI), DX              // readable: a longer string follows the arguments
	CMPL DX, $0x006e7572        // "run"
	JEQ  environment
	CMPL DX, $0x63657865        // "exec"
	JNE  create
	CMPB 4(SI), $0
	JEQ  environment

create:
	CMPL DX, $0x61657263        // "crea"
	JNE  argument
	CMPW 4(SI), $0x6574         // "te"
	JNE  argument
	CMPB 6(SI), $0
	JNE  argument

	// Count the environment; the marker says that this is the second execution.
environment:
	XORQ R15, R15
	MOVQ marker<>+0(SB), R8
	MOVQ marker<>+8(SB), R9

variable:
	MOVQ (R14)(R15*8), SI
	TESTQ SI, SI
	JEQ  protect
	INCQ R15
	CMPQ 0(SI), R8              // readable: the file's name and a nil word end the stack
	JNE  variable
	CMPQ 8(SI), R9
	JNE  variable
	JMP  start

protect:
	MOVQ $SYS_prctl, AX
	MOVQ $4, DI                 // PR_SET_DUMPABLE
	XORQ SI, SI
	XORQ DX, DX
	XORQ R10, R10
	XORQ R8, R8
	SYSCALL

	MOVQ $SYS_open_tree, AX
	MOVQ $-100, DI              // AT_FDCWD
	LEAQ path<>(SB), SI
	MOVQ $0x80001, DX           // OPEN_TREE_CLONE|OPEN_TREE_CLOEXEC
	SYSCALL
	TESTQ AX, AX
	JLT  start
	MOVQ AX, BX

	// On a read-only mount already: nothing to do.
	SUBQ $128, SP
	MOVQ $SYS_fstatfs, AX
	MOVQ BX, DI
	MOVQ SP, SI
	SYSCALL
	TESTQ AX, AX
	JNE  giveup
	TESTQ $1, 80(SP)            // f_flags, ST_RDONLY
	JNE  giveup

	MOVQ $3, 0(SP)              // attr_set: MOUNT_ATTR_RDONLY|MOUNT_ATTR_NOSUID
	MOVQ $0, 8(SP)
	MOVQ $0, 16(SP)
	MOVQ $0, 24(SP)
	MOVQ $SYS_mount_setattr, AX
	MOVQ BX, DI
	LEAQ marker<>+18(SB), SI    // ""
	MOVQ $0x1000, DX            // AT_EMPTY_PATH
	MOVQ SP, R10
	MOVQ $32, R8
	SYSCALL
	TESTQ AX, AX
	JNE  giveup

	// The environment with the marker behind it.
	LEAQ 16(R15*8), AX
	SUBQ AX, SP
	XORQ AX, AX

copy:
	CMPQ AX, R15
	JGE  copied
	MOVQ (R14)(AX*8), DX
	MOVQ DX, (SP)(AX*8)
	INCQ AX
	JMP  copy

copied:
	LEAQ marker<>(SB), DX
	MOVQ DX, (SP)(R15*8)
	MOVQ $0, 8(SP)(R15*8)
	MOVQ $SYS_execveat, AX
	MOVQ BX, DI
	LEAQ marker<>+18(SB), SI    // ""
	MOVQ R13, DX
	MOVQ SP, R10
	MOVQ $0x1000, R8            // AT_EMPTY_PATH
	SYSCALL

giveup:
	MOVQ $SYS_close, AX
	MOVQ BX, DI
	SYSCALL

start:
	LEAQ -8(R13), SP
	JMP  _rt0_amd64_linux(SB)
