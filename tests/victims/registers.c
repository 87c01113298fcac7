/* registers: threads hold known values in every general, x87, SSE, AVX and AVX-512 register, in loops without system calls and
 * across them, in MXCSR, the x87 control word, protection keys' register, and thread-local storage. */
#include "victim.h"
#include <sys/syscall.h>

static bool have_avx, have_avx512;
static _Thread_local uint64_t local_words[64];
static _Thread_local uint64_t local_initialised = 0x1234567890abcdef;

static void vectors_avx512(const char *in, char *out, long spins)
{
#define L(n) "vmovdqu64 (" #n "*64)(%[in]), %%zmm" #n "\n"
#define S(n) "vmovdqu64 %%zmm" #n ", (" #n "*64)(%[out])\n"
#define ALL32(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) \
    X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31)
    asm volatile(ALL32(L) "kmovq %%rcx, %%k1\n kmovq %%rcx, %%k7\n"
                 "mov %[spins], %%rax\n 1: pause\n dec %%rax\n jnz 1b\n"
                 ALL32(S) "kmovq %%k1, 2048(%[out])\n kmovq %%k7, 2056(%[out])\n vzeroupper\n"
                 : : [in] "r"(in), [out] "r"(out), [spins] "r"(spins), "c"(0x5a5aa5a5deadbeef)
                 : "rax", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef L
#undef S
}

static void vectors_avx(const char *in, char *out, long spins)
{
#define L(n) "vmovdqu (" #n "*32)(%[in]), %%ymm" #n "\n"
#define S(n) "vmovdqu %%ymm" #n ", (" #n "*32)(%[out])\n"
#define ALL16(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15)
    asm volatile(ALL16(L) "mov %[spins], %%rax\n 1: pause\n dec %%rax\n jnz 1b\n" ALL16(S) "vzeroupper\n"
                 : : [in] "r"(in), [out] "r"(out), [spins] "r"(spins)
                 : "rax", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
#undef L
#undef S
}

/* Sixteen SSE registers over a clock_nanosleep of 20 ms: most stops catch the thread in here. */
static long vectors_asleep(const char *in, char *out)
{
    struct timespec pause = {.tv_nsec = 20 * 1000 * 1000};
    register long flags asm("rsi") = 0;
    register struct timespec *request asm("rdx") = &pause;
    register struct timespec *rest asm("r10") = NULL;
    long result = SYS_clock_nanosleep;
#define L(n) "movdqu (" #n "*16)(%[in]), %%xmm" #n "\n"
#define S(n) "movdqu %%xmm" #n ", (" #n "*16)(%[out])\n"
    asm volatile(ALL16(L) "syscall\n" ALL16(S)
                 : "+a"(result) : [in] "r"(in), [out] "r"(out), "D"((long)CLOCK_MONOTONIC), "r"(flags), "r"(request), "r"(rest)
                 : "rcx", "r11", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",
                   "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");
    return result;
}

/* Eleven general registers with known values, and the carry flag, over a spin. */
static bool general(uint64_t key, long spins)
{
    uint64_t out[11];
    asm volatile("push %%rbp\n push %%rbx\n push %[out]\n"
                 "mov %[key], %%rax\n"
                 "lea 1(%%rax), %%rbx\n lea 2(%%rax), %%rdx\n lea 3(%%rax), %%rsi\n lea 4(%%rax), %%rdi\n"
                 "lea 5(%%rax), %%rbp\n lea 6(%%rax), %%r8\n lea 7(%%rax), %%r9\n lea 8(%%rax), %%r10\n"
                 "lea 9(%%rax), %%r11\n lea 10(%%rax), %%r12\n"
                 "1: pause\n dec %%rcx\n jnz 1b\n"
                 "pop %%rcx\n"
                 "mov %%rax, 0(%%rcx)\n mov %%rbx, 8(%%rcx)\n mov %%rdx, 16(%%rcx)\n mov %%rsi, 24(%%rcx)\n"
                 "mov %%rdi, 32(%%rcx)\n mov %%rbp, 40(%%rcx)\n mov %%r8, 48(%%rcx)\n mov %%r9, 56(%%rcx)\n"
                 "mov %%r10, 64(%%rcx)\n mov %%r11, 72(%%rcx)\n mov %%r12, 80(%%rcx)\n"
                 "pop %%rbx\n pop %%rbp\n"
                 : "+c"(spins) : [key] "r"(key), [out] "r"(out)
                 : "rax", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "memory", "cc");
    checked();
    for (unsigned i = 0; i < COUNT(out); i++)
        if (out[i] != key + i)
            return false;
    return true;
}

static void *hold(void *argument)
{
    uint64_t number = (uintptr_t)argument;
    char in[2048 + 16], out[2048 + 16];
    uint32_t mxcsr = 0x1f80 | (uint32_t)(number % 4) << 13, got_mxcsr;
    uint16_t control = 0x027f | (uint16_t)(number % 4) << 10, got_control;
    asm volatile("ldmxcsr %0\n fldcw %1" : : "m"(mxcsr), "m"(control));
    for (unsigned i = 0; i < COUNT(local_words); i++)
        local_words[i] = mix(number * 1000 + i);
    pthread_t self = pthread_self();
    for (uint64_t round = 0; !stopping(); round++) {
        for (unsigned i = 0; i < 256; i++)
            ((uint64_t *)in)[i] = mix(number << 32 | round << 8 | i);
        memset(out, 0, sizeof out);
        size_t size = have_avx512 ? 2048 : have_avx ? 512 : 0;
        if (have_avx512)
            vectors_avx512(in, out, 20000);
        else if (have_avx)
            vectors_avx(in, out, 20000);
        CHECK(!memcmp(in, out, size), "thread %lu: vector registers differ", number);
        if (have_avx512)
            CHECK(((uint64_t *)out)[256] == 0x5a5aa5a5deadbeef && ((uint64_t *)out)[257] == 0x5a5aa5a5deadbeef,
                  "thread %lu: mask registers differ", number);
        CHECK(general(mix(number + round), 20000), "thread %lu: general registers differ", number);
        memset(out, 0, 256);
        long result = vectors_asleep(in, out);
        CHECK(result == 0, "thread %lu: clock_nanosleep yields %ld", number, result);
        CHECK(!memcmp(in, out, 256), "thread %lu: SSE registers differ after a system call", number);
        asm volatile("stmxcsr %0\n fnstcw %1" : "=m"(got_mxcsr), "=m"(got_control));
        CHECK((got_mxcsr & ~0x3fu) == mxcsr, "thread %lu: MXCSR %x instead of %x", number, got_mxcsr, mxcsr);
        CHECK(got_control == control, "thread %lu: x87 control word %x instead of %x", number, got_control, control);
        for (unsigned i = 0; i < COUNT(local_words); i++)
            CHECK(local_words[i] == mix(number * 1000 + i), "thread %lu: thread-local word %u differs", number, i);
        CHECK(local_initialised == 0x1234567890abcdef, "thread %lu: initialised thread-local word differs", number);
        CHECK(pthread_equal(self, pthread_self()), "thread %lu: pthread_self differs", number);
    }
    return NULL;
}

void victim_registers(void)
{
    long threads = argument(0, 4);
    have_avx = __builtin_cpu_supports("avx");
    have_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    say("avx %d avx512 %d", have_avx, have_avx512);
    pthread_t ids[64];
    if (threads > 64)
        threads = 64;
    for (long i = 0; i < threads; i++)
        ids[i] = start_thread(hold, (void *)(uintptr_t)(i + 1));
    ready();
    while (beat())
        ;
    for (long i = 0; i < threads; i++)
        pthread_join(ids[i], NULL);
}
