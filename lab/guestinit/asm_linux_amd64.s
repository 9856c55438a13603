#include "textflag.h"

// The pattern is kept in ymm0..ymm7: one register each would do, more make a
// partial loss visible too.

#define LOADPATTERN(reg) \
	VMOVUPS (reg), Y0 \
	VMOVUPS (reg), Y1 \
	VMOVUPS (reg), Y2 \
	VMOVUPS (reg), Y3 \
	VMOVUPS (reg), Y4 \
	VMOVUPS (reg), Y5 \
	VMOVUPS (reg), Y6 \
	VMOVUPS (reg), Y7

// CHECKPATTERN leaves ZF set if all the registers are still the pattern.
#define CHECKPATTERN(reg) \
	VMOVUPS (reg), Y8 \
	VXORPS Y8, Y0, Y9 \
	VXORPS Y8, Y1, Y10 \
	VORPS Y9, Y10, Y9 \
	VXORPS Y8, Y2, Y10 \
	VORPS Y9, Y10, Y9 \
	VXORPS Y8, Y3, Y10 \
	VORPS Y9, Y10, Y9 \
	VXORPS Y8, Y4, Y10 \
	VORPS Y9, Y10, Y9 \
	VXORPS Y8, Y5, Y10 \
	VORPS Y9, Y10, Y9 \
	VXORPS Y8, Y6, Y10 \
	VORPS Y9, Y10, Y9 \
	VXORPS Y8, Y7, Y10 \
	VORPS Y9, Y10, Y9 \
	VPTEST Y9, Y9

// func openLoop(path *byte, n uint64, pattern *[32]byte) (made, failed, bad uint64)
TEXT ·openLoop(SB), NOSPLIT, $0-48
	MOVQ n+8(FP), R12
	MOVQ pattern+16(FP), R13
	XORQ R8, R8   // made
	XORQ R9, R9   // failed
	XORQ BX, BX   // bad
	TESTQ R13, R13
	JZ   next
	LOADPATTERN(R13)
next:
	TESTQ R12, R12
	JZ   done
	DECQ R12
	MOVQ $257, AX          // openat
	MOVQ $-100, DI         // AT_FDCWD
	MOVQ path+0(FP), SI
	XORQ DX, DX            // O_RDONLY
	XORQ R10, R10
	SYSCALL
	INCQ R8
	TESTQ AX, AX
	JL   fail
	MOVQ AX, DI
	MOVQ $3, AX            // close
	SYSCALL
	JMP  check
fail:
	INCQ R9
check:
	TESTQ R13, R13
	JZ   next
	CHECKPATTERN(R13)
	JZ   next
	INCQ BX
	LOADPATTERN(R13)
	JMP  next
done:
	TESTQ R13, R13
	JZ   out
	VZEROUPPER
out:
	MOVQ R8, made+24(FP)
	MOVQ R9, failed+32(FP)
	MOVQ BX, bad+40(FP)
	RET

// func ymmLoop(pattern *[32]byte, spins uint64, pause *[2]int64) (bad uint64)
TEXT ·ymmLoop(SB), NOSPLIT, $0-32
	MOVQ pattern+0(FP), R13
	MOVQ spins+8(FP), R12
	XORQ BX, BX
	LOADPATTERN(R13)
spin:
	DECQ R12
	JNZ  spin
	MOVQ $35, AX           // nanosleep
	MOVQ pause+16(FP), DI
	XORQ SI, SI
	SYSCALL
	CHECKPATTERN(R13)
	JZ   fine
	INCQ BX
fine:
	VZEROUPPER
	MOVQ BX, bad+24(FP)
	RET

// func int3Loop(n uint64)
TEXT ·int3Loop(SB), NOSPLIT, $0-8
	MOVQ n+0(FP), R12
again:
	TESTQ R12, R12
	JZ   end
	BYTE $0xcc
	DECQ R12
	JMP  again
end:
	RET

// trapHandler is a signal handler: no Go code, no stack, one counter.
TEXT trapHandler<>(SB), NOSPLIT|NOFRAME, $0
	LOCK
	INCQ ·traps(SB)
	RET

// trapReturn ends a signal handler.
TEXT trapReturn<>(SB), NOSPLIT|NOFRAME, $0
	MOVQ $15, AX           // rt_sigreturn
	SYSCALL
	INT $3

// func trapAddresses() (handler, restorer uintptr)
TEXT ·trapAddresses(SB), NOSPLIT, $0-16
	MOVQ $trapHandler<>(SB), AX
	MOVQ AX, handler+0(FP)
	MOVQ $trapReturn<>(SB), AX
	MOVQ AX, restorer+8(FP)
	RET

// func setDS(selector uint64)
TEXT ·setDS(SB), NOSPLIT, $0-8
	MOVQ selector+0(FP), AX
	BYTE $0x8e; BYTE $0xd8 // mov %eax,%ds
	RET

// func getDS() (selector uint64)
TEXT ·getDS(SB), NOSPLIT, $0-8
	XORL AX, AX
	BYTE $0x8c; BYTE $0xd8 // mov %ds,%eax
	MOVQ AX, selector+0(FP)
	RET

// func readLoop(n, fd uint64, byKernel, byUser *uint64)
TEXT ·readLoop(SB), NOSPLIT, $0-32
	MOVQ n+0(FP), R12
	MOVQ byUser+24(FP), R13
again:
	TESTQ R12, R12
	JZ   end
	XORQ AX, AX            // read
	MOVQ fd+8(FP), DI
	MOVQ byKernel+16(FP), SI
	MOVQ $8, DX
	SYSCALL
	MOVQ R12, (R13)
	DECQ R12
	JMP  again
end:
	RET

// func callLoop(times, calls uint64)
TEXT ·callLoop(SB), NOSPLIT, $8-16
	MOVQ times+0(FP), R13
again:
	TESTQ R13, R13
	JZ   end
	MOVQ calls+8(FP), R12
	CALL call<>(SB)
	DECQ R13
	JMP  again
end:
	RET

// call makes R12 system calls, which must be one or more. callSteps counts its
// instructions.
TEXT call<>(SB), NOSPLIT|NOFRAME, $0
again:
	MOVQ $110, AX          // getppid
	SYSCALL
	DECQ R12
	JNZ  again
	RET

// func callAddress() uintptr
TEXT ·callAddress(SB), NOSPLIT, $0-8
	MOVQ $call<>(SB), AX
	MOVQ AX, ret+0(FP)
	RET

// func forkExit() (pid int)
TEXT ·forkExit(SB), NOSPLIT, $0-8
	MOVQ $57, AX           // fork
	SYSCALL
	TESTQ AX, AX
	JNZ  parent
	MOVQ $231, AX          // exit_group
	XORQ DI, DI
	SYSCALL
parent:
	MOVQ AX, pid+0(FP)
	RET

// func forkRead(fd uint64) (pid int)
TEXT ·forkRead(SB), NOSPLIT, $8-16
	MOVQ $57, AX           // fork
	SYSCALL
	TESTQ AX, AX
	JNZ  parent
	XORQ AX, AX            // read
	MOVQ fd+0(FP), DI
	LEAQ byte-8(SP), SI
	MOVQ $1, DX
	SYSCALL
	MOVQ $231, AX          // exit_group
	XORQ DI, DI
	SYSCALL
parent:
	MOVQ AX, pid+8(FP)
	RET
