#include "textflag.h"

#define SYS_clone3 435

// func cloneWalk(args *cloneArgs, size uintptr, m *machine) (pid, errno uintptr)
TEXT ·cloneWalk(SB), NOSPLIT|NOFRAME, $0-40
	MOVQ	args+0(FP), DI
	MOVQ	size+8(FP), SI
	MOVQ	m+16(FP), R12
	MOVL	$SYS_clone3, AX
	SYSCALL
	TESTQ	AX, AX
	JEQ	child
	CMPQ	AX, $0xfffffffffffff001
	JCC	failed
	MOVQ	AX, pid+24(FP)
	MOVQ	$0, errno+32(FP)
	RET
failed:
	NEGQ	AX
	MOVQ	$0, pid+24(FP)
	MOVQ	AX, errno+32(FP)
	RET
child:
	// On the new stack; the machine is the argument.
	XORL	BP, BP
	LEAQ	-32(SP), SP
	MOVQ	R12, 0(SP)
	MOVQ	$·walk(SB), AX // indirect: the linker would count its stack as ours
	CALL	AX
	INT	$3
