/* signals: pending real-time signals with payload, for the process and for a thread, stay pending in order; dispositions, masks and
 * alternate stacks stay; handlers run on the alternate stack, one of them during the whole life of the victim. */
#include "victim.h"
#include <signal.h>
#include <sys/syscall.h>

#define PENDING 5
static struct sigaction dispositions[65];
static pid_t leader;
static volatile sig_atomic_t handled, on_stack, payload;
static _Thread_local char *stack_start;
static const size_t stack_size = 64 * 1024;

static void on_usr1(int signal, siginfo_t *info, void *context)
{
    char here;
    handled++;
    on_stack = &here >= stack_start && &here < stack_start + stack_size;
    payload = info->si_value.sival_int;
}

static void take_alternate_stack(void)
{
    stack_start = malloc(stack_size);
    stack_t stack = {.ss_sp = stack_start, .ss_size = stack_size};
    NEED(sigaltstack(&stack, NULL));
}

static void check_alternate_stack(int flags)
{
    stack_t stack;
    CHECK_EQUAL(sigaltstack(NULL, &stack), 0, "sigaltstack");
    CHECK(stack.ss_sp == stack_start && stack.ss_size == stack_size && stack.ss_flags == flags,
          "alternate stack %p %zu %x instead of %p %zu %x", stack.ss_sp, stack.ss_size, stack.ss_flags, (void *)stack_start,
          stack_size, flags);
}

/* This handler returns only when the victim ends: a thread is moved while it runs on its alternate stack. */
static void on_usr2(int signal, siginfo_t *info, void *context)
{
    sigset_t mask;
    thread_is_set_up();
    while (!stopping()) {
        check_alternate_stack(SS_ONSTACK);
        pthread_sigmask(SIG_BLOCK, NULL, &mask);
        CHECK(sigismember(&mask, SIGUSR2) && sigismember(&mask, SIGHUP), "mask inside the handler");
        usleep(5000);
    }
}

static void *inside_a_handler(void *argument)
{
    take_alternate_stack();
    uint64_t before = mix(7), after = before;
    pthread_kill(pthread_self(), SIGUSR2);
    CHECK(before == after, "a local variable changed over the handler");
    check_alternate_stack(0);
    return NULL;
}

static void block_real_time(sigset_t *set)
{
    sigemptyset(set);
    for (int i = 1; i <= PENDING; i++)
        sigaddset(set, SIGRTMIN + i);
    NEED(pthread_sigmask(SIG_BLOCK, set, NULL));
}

/* Queues, in this order, several instances a signal: each with a payload of its own. */
static void queue(int round, bool to_thread)
{
    for (int i = 0; i < PENDING * 2; i++) {
        union sigval value = {.sival_ptr = (void *)(uintptr_t)mix(round * 100 + i)};
        int number = SIGRTMIN + 1 + i % PENDING;
        int error = to_thread ? pthread_sigqueue(pthread_self(), number, value) : sigqueue(leader, number, value);
        if (error)
            wrong("queueing signal %d: %s", number, strerror(errno));
    }
}

static void collect(int round, const sigset_t *set, const char *who)
{
    sigset_t pending;
    sigpending(&pending);
    for (int i = 1; i <= PENDING; i++)
        CHECK(sigismember(&pending, SIGRTMIN + i) == 1, "%s: signal %d is no longer pending", who, SIGRTMIN + i);
    /* The lowest number first, equal numbers in the order of their birth. */
    for (int i = 0; i < PENDING * 2; i++) {
        siginfo_t info;
        int place = i / 2 + i % 2 * PENDING;
        struct timespec at_once = {0};
        int number = sigtimedwait(set, &info, &at_once);
        CHECK(number == SIGRTMIN + 1 + i / 2, "%s: signal %d instead of %d", who, number, SIGRTMIN + 1 + i / 2);
        CHECK(info.si_value.sival_ptr == (void *)(uintptr_t)mix(round * 100 + place), "%s: payload of signal %d", who, number);
        CHECK(info.si_code == SI_QUEUE && info.si_pid == leader && info.si_uid == getuid(),
              "%s: signal %d: code %d pid %d (I am %d)", who, number, info.si_code, info.si_pid, leader);
    }
}

static void *thread_pending(void *argument)
{
    sigset_t set;
    block_real_time(&set);
    thread_is_set_up();
    for (int round = 1000; !stopping(); round++) {
        queue(round, true);
        for (int i = 0; i < 40 && !stopping(); i++)
            usleep(10000);
        collect(round, &set, "thread");
    }
    return NULL;
}

static void set_dispositions(void)
{
    struct sigaction action = {.sa_sigaction = on_usr1, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    sigaddset(&action.sa_mask, SIGALRM);
    NEED(sigaction(SIGUSR1, &action, NULL));
    action.sa_sigaction = on_usr2;
    sigaddset(&action.sa_mask, SIGHUP);
    NEED(sigaction(SIGUSR2, &action, NULL));
    signal(SIGPIPE, SIG_IGN);
    signal(SIGRTMAX, SIG_IGN);
    for (int i = 1; i < 65; i++)
        sigaction(i, NULL, &dispositions[i]);
}

static void check_dispositions(void)
{
    for (int i = 1; i < 65; i++) {
        struct sigaction now = {0};
        if (sigaction(i, NULL, &now))
            continue;
        CHECK(now.sa_sigaction == dispositions[i].sa_sigaction && now.sa_flags == dispositions[i].sa_flags &&
                  !memcmp(&now.sa_mask, &dispositions[i].sa_mask, 8),
              "disposition of signal %d", i);
    }
}

void victim_signals(void)
{
    sigset_t set, mask;
    leader = getpid();
    take_alternate_stack();
    set_dispositions();
    /* Every thread that does not block a signal could take it: threads inherit the mask. */
    block_real_time(&set);
    pthread_t inside = start_thread(inside_a_handler, NULL);
    pthread_t pending = start_thread(thread_pending, NULL);
    /* Blocked and pending for ever: nobody fetches this one. */
    sigset_t window;
    sigemptyset(&window);
    sigaddset(&window, SIGWINCH);
    NEED(pthread_sigmask(SIG_BLOCK, &window, NULL));
    raise(SIGWINCH);
    queue(0, false);
    wait_for_threads(2);
    ready();
    for (int i = 1, round = 0; beat(); i++) {
        check_dispositions();
        check_alternate_stack(0);
        pthread_sigmask(SIG_BLOCK, NULL, &mask);
        for (int n = 1; n < 32; n++)
            CHECK(sigismember(&mask, n) == (n == SIGWINCH), "signal %d in the mask", n);
        sigpending(&mask);
        CHECK(sigismember(&mask, SIGWINCH) == 1, "SIGWINCH is no longer pending");
        int before = handled;
        pthread_sigqueue(pthread_self(), SIGUSR1, (union sigval){.sival_int = i});
        CHECK(handled == before + 1 && on_stack && payload == i, "handler: %d calls, on its stack %d, payload %d", handled - before,
              on_stack, payload);
        if (i % 50 == 0) {
            collect(round++, &set, "process");
            queue(round, false);
        }
    }
    pthread_join(inside, NULL);
    pthread_join(pending, NULL);
}
