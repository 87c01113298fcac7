/* files: descriptors of the file system. Offsets, flags, sharing between duplicates, deleted files with content, directories halfway read,
 * O_PATH, character devices, numbers with gaps. */
#include "victim.h"
#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>

static int plain, duplicate, reopened, appending, deleted, nameless, directory, path_only, null_fd, zero, full, urandom, random_fd, far_away;
static unsigned rounds;

static int with_content(const char *name, uint64_t key, int flags)
{
    char page[PAGE];
    int fd = NEED(open(in_dir(name), flags | O_RDWR | O_CREAT, 0640));
    for (unsigned i = 0; i < 16; i++) {
        page_fill(page, key + i, 0);
        if (write(fd, page, PAGE) != PAGE)
            die("writing %s", name);
    }
    return fd;
}

static void open_all(void)
{
    plain = with_content("plain", 100, O_CLOEXEC);
    NEED(lseek(plain, 5 * PAGE, SEEK_SET));
    duplicate = NEED(fcntl(plain, F_DUPFD, 200));
    reopened = NEED(open(in_dir("plain"), O_RDONLY | O_NOATIME));
    NEED(lseek(reopened, 9 * PAGE, SEEK_SET));
    appending = NEED(open(in_dir("appending"), O_WRONLY | O_CREAT | O_APPEND | O_NONBLOCK | O_SYNC, 0600));
    deleted = with_content("deleted", 300, 0);
    NEED(unlink(in_dir("deleted")));
    NEED(lseek(deleted, 3 * PAGE, SEEK_SET));
    nameless = NEED(open(victim_dir, O_TMPFILE | O_RDWR, 0600));
    if (write(nameless, "nameless", 8) != 8)
        die("writing a file without name");
    NEED(mkdir(in_dir("sub"), 0755));
    for (int i = 0; i < 40; i++) {
        char name[32];
        snprintf(name, sizeof name, "sub/entry-%02d", i);
        close(NEED(open(in_dir(name), O_WRONLY | O_CREAT, 0600)));
    }
    directory = NEED(open(in_dir("sub"), O_RDONLY | O_DIRECTORY));
    path_only = NEED(open(in_dir("sub"), O_PATH | O_NOFOLLOW));
    null_fd = NEED(open("/dev/null", O_RDWR));
    zero = NEED(open("/dev/zero", O_RDONLY));
    full = NEED(open("/dev/full", O_WRONLY));
    urandom = NEED(open("/dev/urandom", O_RDONLY));
    random_fd = NEED(open("/dev/random", O_RDONLY | O_NONBLOCK));
    far_away = NEED(dup3(null_fd, 900, O_CLOEXEC));
}

/* One pass over the directory takes many heartbeats; each pass sees every entry exactly once. */
static void read_some_entries(void)
{
    static unsigned seen;
    static uint64_t sum;
    char buffer[120];
    long got = syscall(SYS_getdents64, directory, buffer, sizeof buffer);
    CHECK(got >= 0, "getdents: %s", strerror(errno));
    for (long at = 0; at < got;) {
        struct dirent64 *entry = (void *)(buffer + at);
        if (!strncmp(entry->d_name, "entry-", 6)) {
            seen++;
            sum += mix(atoi(entry->d_name + 6));
        }
        at += entry->d_reclen;
    }
    if (got > 0)
        return;
    uint64_t want = 0;
    for (int i = 0; i < 40; i++)
        want += mix(i);
    CHECK(seen == 40 && sum == want, "a pass over the directory saw %u entries", seen);
    seen = sum = 0;
    lseek(directory, 0, SEEK_SET);
}

static void check_flags(int fd, int want_status, int want_descriptor, const char *name)
{
    int status = fcntl(fd, F_GETFL), descriptor = fcntl(fd, F_GETFD);
    CHECK((status & ~0100000) == want_status, "%s: status flags %o instead of %o", name, status, want_status);
    CHECK(descriptor == want_descriptor, "%s: descriptor flags %d instead of %d", name, descriptor, want_descriptor);
}

static void check_offsets(void)
{
    CHECK_EQUAL(lseek(plain, 0, SEEK_CUR), 5 * PAGE + rounds % 100, "offset");
    CHECK_EQUAL(lseek(duplicate, 0, SEEK_CUR), 5 * PAGE + rounds % 100, "offset of the duplicate");
    CHECK_EQUAL(lseek(reopened, 0, SEEK_CUR), 9 * PAGE, "offset of the file opened twice");
    CHECK_EQUAL(lseek(deleted, 0, SEEK_CUR), 3 * PAGE, "offset of the deleted file");
    CHECK_EQUAL(lseek(nameless, 0, SEEK_CUR), 8, "offset of the file without name");
    rounds++;
    lseek(rounds % 2 ? duplicate : plain, 5 * PAGE + rounds % 100, SEEK_SET);
}

static void check_content(void)
{
    char page[PAGE];
    struct stat status;
    unsigned i = rounds % 16;
    CHECK(pread(plain, page, PAGE, i * PAGE) == PAGE && page_is(page, 100 + i, 0), "page %u of the file", i);
    static unsigned versions[16];
    CHECK(pread(deleted, page, PAGE, i * PAGE) == PAGE && page_is(page, 300 + i, versions[i]), "page %u of the deleted file", i);
    page_fill(page, 300 + i, ++versions[i]);
    CHECK(pwrite(deleted, page, PAGE, i * PAGE) == PAGE, "writing the deleted file");
    CHECK(!fstat(deleted, &status) && status.st_nlink == 0 && status.st_size == 16 * (long)PAGE && (status.st_mode & 07777) == 0640,
          "the deleted file: %lu links, size %ld, mode %o", (unsigned long)status.st_nlink, status.st_size, status.st_mode);
    CHECK(pread(nameless, page, 9, 0) == 8 && !memcmp(page, "nameless", 8), "the file without name");
    CHECK(!fstat(nameless, &status) && status.st_nlink == 0, "the file without name has %lu links", (unsigned long)status.st_nlink);
    char byte = (char)rounds;
    CHECK(write(appending, &byte, 1) == 1, "appending");
    CHECK(!fstat(appending, &status) && status.st_size == rounds, "the appended file has %ld bytes instead of %u", status.st_size, rounds);
}

static void check_devices(void)
{
    uint64_t a = 1, b = 1;
    CHECK(read(zero, &a, 8) == 8 && a == 0, "/dev/zero");
    CHECK(read(null_fd, &a, 8) == 0 && write(far_away, &a, 8) == 8, "/dev/null");
    CHECK(write(full, &a, 8) == -1 && errno == ENOSPC, "/dev/full");
    CHECK(read(urandom, &a, 8) == 8 && read(random_fd, &b, 8) == 8 && a != b, "/dev/urandom");
    CHECK(read(path_only, &a, 8) == -1 && errno == EBADF, "an O_PATH descriptor can be read");
    CHECK(faccessat(path_only, "entry-07", R_OK, 0) == 0, "an O_PATH directory leads nowhere");
    CHECK(fcntl(199, F_GETFD) == -1 && fcntl(201, F_GETFD) == -1, "descriptors that nobody opened");
}

void victim_files(void)
{
    open_all();
    int appending_flags = fcntl(appending, F_GETFL) & ~0100000, reopened_flags = fcntl(reopened, F_GETFL) & ~0100000;
    ready();
    while (beat()) {
        check_offsets();
        check_content();
        check_devices();
        read_some_entries();
        check_flags(plain, O_RDWR, FD_CLOEXEC, "plain");
        check_flags(duplicate, O_RDWR, 0, "duplicate");
        check_flags(reopened, reopened_flags, 0, "opened twice");
        check_flags(appending, appending_flags, 0, "appending");
        check_flags(far_away, O_RDWR, FD_CLOEXEC, "number 900");
        check_flags(directory, O_DIRECTORY, 0, "directory");
        check_flags(path_only, O_PATH | O_NOFOLLOW, 0, "O_PATH");
    }
}
