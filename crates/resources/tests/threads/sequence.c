/* Spends its life inside a restartable sequence; says where the sequence begins, ends and is aborted to. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/rseq.h>

extern const char sequence_start[], sequence_end[], sequence_abort[];
volatile unsigned long rounds, aborts;

int main(void)
{
    struct rseq *area = (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
    setbuf(stdout, NULL);
    puts("ready");
    if (__rseq_size == 0) {
        puts("none");
        exit(1);
    }
    printf("%lx %lx %lx\n", (long)sequence_start, (long)sequence_end, (long)sequence_abort);
    __asm__ volatile(
        ".pushsection .data.rel, \"aw\"\n"
        ".balign 32\n"
        "9: .long 0, 0\n"
        ".quad sequence_start, sequence_end - sequence_start, sequence_abort\n"
        ".popsection\n"
        "1: leaq 9b(%%rip), %%rax\n"
        "movq %%rax, %0\n"
        ".globl sequence_start\n"
        "sequence_start:\n"
        "incq rounds(%%rip)\n"
        "jmp sequence_start\n"
        ".globl sequence_end\n"
        "sequence_end:\n"
        ".byte 0x0f, 0xb9, 0x3d\n"
        ".long 0x53053053\n"
        ".globl sequence_abort\n"
        "sequence_abort:\n"
        "incq aborts(%%rip)\n"
        "jmp 1b\n"
        : "=m"(area->rseq_cs)
        :
        : "rax", "memory");
}
