/* holders: why the descriptors of missing memory must be held by two processes. When the last one closes, a thread that waits for a page
 * reads zeros that nobody wrote; while another process holds a copy, it waits, and gets the page from there. */
#include "victim.h"
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>

static volatile uint64_t *memory;
static volatile uint64_t read_value;
static volatile int done;

static int missing_page(void)
{
    int fd = NEED(syscall(SYS_userfaultfd, O_CLOEXEC));
    struct uffdio_api api = {.api = UFFD_API};
    NEED(ioctl(fd, UFFDIO_API, &api));
    memory = NEED(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    struct uffdio_register range = {.range = {(uintptr_t)memory, PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    NEED(ioctl(fd, UFFDIO_REGISTER, &range));
    return fd;
}

static void *read_it(void *argument)
{
    read_value = memory[3];
    done = 1;
    return NULL;
}

static pthread_t start_reader(void)
{
    done = 0;
    read_value = 1;
    pthread_t reader = start_thread(read_it, NULL);
    usleep(50000);
    CHECK(!done, "the reader does not wait");
    return reader;
}

static void one_holder(void)
{
    int fd = missing_page();
    pthread_t reader = start_reader();
    close(fd);
    pthread_join(reader, NULL);
    CHECK(read_value == 0, "without a holder the reader got %lx, not a made-up zero", read_value);
}

static void two_holders(void)
{
    int fd = missing_page(), signal_pipe[2];
    NEED(pipe(signal_pipe));
    pid_t holder = NEED(fork());
    if (holder == 0) {
        char page[PAGE], byte;
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        page_fill(page, 11, 12);
        if (read(signal_pipe[0], &byte, 1) != 1)
            _exit(1);
        struct uffdio_copy copy = {.dst = (uintptr_t)memory, .src = (uintptr_t)page, .len = PAGE};
        _exit(ioctl(fd, UFFDIO_COPY, &copy) ? 1 : 0);
    }
    pthread_t reader = start_reader();
    close(fd);
    usleep(100000);
    CHECK(!done, "the reader did not wait for the second holder: it read %lx", read_value);
    int status = -1;
    NEED(write(signal_pipe[1], "x", 1));
    waitpid(holder, &status, 0);
    pthread_join(reader, NULL);
    CHECK(status == 0 && page_is((void *)memory, 11, 12), "the second holder's page did not come");
    close(signal_pipe[0]);
    close(signal_pipe[1]);
}

void victim_holders(void)
{
    ready();
    do {
        one_holder();
        two_holders();
    } while (beat());
}
