#include "textflag.h"

// tenon_entry is where the kernel starts the program (the linker's -E, see the
// Makefile): in front of Go's own start. It lends Go code a g, whose stack limit
// of zero lets functions use the kernel's stack as it is, calls begin and, if
// that returns, starts Go as if nothing had been.
//
// On entry, as the ABI has it: argc at 0(SP), then argv, nil, envp, nil, auxv.

GLOBL lent<>(SB), NOPTR, $1024
GLOBL tls<>(SB), NOPTR, $16

#define SYS_arch_prctl 158
#define ARCH_SET_FS 0x1002

TEXT tenon_entry(SB), NOSPLIT|NOFRAME|TOPFRAME, $0
	LEAQ lent<>(SB), AX
	MOVQ AX, tls<>(SB)
	MOVQ $SYS_arch_prctl, AX
	MOVQ $ARCH_SET_FS, DI
	LEAQ tls<>+8(SB), SI        // the g is at -8(FS)
	SYSCALL
	TESTQ AX, AX
	JNE  start
	MOVQ SP, AX
	SUBQ $16, SP
	MOVQ AX, 0(SP)
	CALL ·begin(SB)
	ADDQ $16, SP

start:
	JMP  _rt0_amd64_linux(SB)
