/* Count what a run changes on disk, and break it at the n-th call that matches a pattern.
 *
 * Preloaded (LD_PRELOAD), so calls from C++ and Rust are seen like those of Python. Dormant until
 * faults_arm(); the counter lies in shared memory, so all processes forked afterwards count together.
 * Calls count when their path is under one folder. Not seen are what stdio writes inside libc, what
 * is written through mapped memory, and system calls that a program makes without libc.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { NONE, KILL, TORN, ERROR, SIGNAL_ALL, SIGNAL_ONE };
enum verdict { GO_ON, HALF, REFUSED };

struct shared {
    atomic_long count;   /* calls under the folder */
    atomic_long matches; /* those of the pattern */
    atomic_int fired;
    long at;
    int action;
    int value; /* an errno, or a signal */
    int trace; /* a descriptor opened with O_APPEND, or -1 */
    char folder[PATH_MAX];
    char pattern[PATH_MAX]; /* of "operation path", the path relative to the folder. "*": all;
                               otherwise a star stops at a slash, see fnmatch(3) */
};

static struct shared *shared;
static __thread int inside;

#define REAL(name)                                                             \
    static __typeof__(name) *real_##name;                                      \
    if (!real_##name)                                                          \
        real_##name = (__typeof__(name) *)dlsym(RTLD_NEXT, #name);

/* Start counting under `folder`, which is a real path; call before the ranks are forked. */
int faults_arm(const char *folder, const char *pattern, int action, long at, int value, int trace) {
    if (!shared) {
        shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        if (shared == MAP_FAILED) {
            shared = NULL;
            return -1;
        }
    }
    atomic_store(&shared->count, 0);
    atomic_store(&shared->matches, 0);
    atomic_store(&shared->fired, 0);
    shared->at = at;
    shared->action = action;
    shared->value = value;
    shared->trace = trace;
    snprintf(shared->folder, sizeof shared->folder, "%s", folder);
    snprintf(shared->pattern, sizeof shared->pattern, "%s", pattern);
    return 0;
}

long faults_count(void) { return shared ? atomic_load(&shared->count) : -1; }
int faults_fired(void) { return shared ? atomic_load(&shared->fired) : 0; }

static _Noreturn void die(void) {
    REAL(kill)
    real_kill(0, SIGKILL); /* the run's own process group */
    for (;;)
        pause();
}

/* Absolute path of a name below a folder that is open, or the working one. */
static int absolute(int dirfd, const char *name, char *path) {
    char base[PATH_MAX], link[64];
    ssize_t size;
    if (!name)
        return 0;
    if (name[0] == '/')
        return snprintf(path, PATH_MAX, "%s", name) > 0;
    if (dirfd == AT_FDCWD)
        snprintf(link, sizeof link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", dirfd);
    size = readlink(link, base, sizeof base - 1);
    if (size <= 0)
        return 0;
    base[size] = 0;
    if (name[0])
        return snprintf(path, PATH_MAX, "%.2040s/%.2040s", base, name) > 0;
    return snprintf(path, PATH_MAX, "%s", base) > 0;
}

static int refused_by(const char *operation, int error) {
    static const char *take_room[] = {"open", "write", "mkdir", "ftruncate", "fallocate", "fsync",
                                      "sendfile", "copy_file_range", "link", "symlink", NULL};
    if (error == EROFS)
        return strcmp(operation, "fsync") != 0;
    for (int i = 0; take_room[i]; i++)
        if (!strcmp(operation, take_room[i]))
            return 1;
    return 0;
}

/* Count a call; decide what becomes of it. On REFUSED errno is set. */
static enum verdict gate(const char *operation, int dirfd, const char *name, long size) {
    char path[PATH_MAX], line[PATH_MAX + 128];
    size_t length;
    long number;
    int saved = errno, fires = 0;
    if (!shared || inside || (name && !name[0] && dirfd >= 0 && dirfd <= 2))
        return GO_ON;
    inside = 1;
    length = strlen(shared->folder);
    if (!absolute(dirfd, name, path) || strncmp(path, shared->folder, length) || path[length] != '/') {
        inside = 0;
        errno = saved;
        return GO_ON;
    }
    number = atomic_fetch_add(&shared->count, 1) + 1;
    snprintf(line, sizeof line, "%s %s", operation, path + length + 1);
    if (!fnmatch(shared->pattern, line, strcmp(shared->pattern, "*") ? FNM_PATHNAME : 0) &&
        atomic_fetch_add(&shared->matches, 1) + 1 == shared->at) {
        fires = 1;
        atomic_store(&shared->fired, 1);
    }
    if (shared->trace >= 0) {
        REAL(write)
        int chars = snprintf(line, sizeof line, "%ld\t%d\t%s\t%ld\t%s\t%s\n", number, getpid(),
                             operation, size, path + length + 1, fires ? "<" : "");
        if (real_write(shared->trace, line, chars) != chars)
            abort();
    }
    inside = 0;
    errno = saved;
    REAL(kill)
    switch (shared->action) {
    case ERROR:
        if (atomic_load(&shared->fired) && refused_by(operation, shared->value)) {
            errno = shared->value;
            return REFUSED;
        }
        return GO_ON;
    case KILL:
        if (fires)
            die();
        return GO_ON;
    case TORN:
        return fires ? HALF : GO_ON;
    case SIGNAL_ALL:
    case SIGNAL_ONE:
        if (fires)
            real_kill(shared->action == SIGNAL_ALL ? 0 : getpid(), shared->value);
        errno = saved;
    }
    return GO_ON;
}

/* Whole calls: half of one is all of it, and then the end. */
#define WHOLE(operation, dirfd, name, size, failed, call)                      \
    switch (gate(operation, dirfd, name, size)) {                              \
    case REFUSED:                                                              \
        return failed;                                                         \
    case HALF:                                                                 \
        call;                                                                  \
        die();                                                                 \
    case GO_ON:                                                                \
        break;                                                                 \
    }                                                                          \
    return call;

#define CHANGES(flags) (((flags)&O_ACCMODE) != O_RDONLY || ((flags) & (O_CREAT | O_TRUNC)))
#define MODE(flags)                                                            \
    mode_t mode = 0;                                                           \
    if ((flags) & (O_CREAT | O_TMPFILE)) {                                     \
        va_list rest;                                                          \
        va_start(rest, flags);                                                 \
        mode = va_arg(rest, mode_t);                                           \
        va_end(rest);                                                          \
    }

#define OPEN(name_)                                                            \
    int name_(const char *path, int flags, ...) {                              \
        MODE(flags)                                                            \
        REAL(name_)                                                            \
        if (!CHANGES(flags))                                                   \
            return real_##name_(path, flags, mode);                            \
        WHOLE("open", AT_FDCWD, path, 0, -1, real_##name_(path, flags, mode))  \
    }
#define OPENAT(name_)                                                          \
    int name_(int dirfd, const char *path, int flags, ...) {                   \
        MODE(flags)                                                            \
        REAL(name_)                                                            \
        if (!CHANGES(flags))                                                   \
            return real_##name_(dirfd, path, flags, mode);                     \
        WHOLE("open", dirfd, path, 0, -1, real_##name_(dirfd, path, flags, mode)) \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int dirfd, const char *path, int flags) { return openat(dirfd, path, flags); }
int __openat64_2(int dirfd, const char *path, int flags) { return openat64(dirfd, path, flags); }

#define FOPEN(name_)                                                           \
    FILE *name_(const char *path, const char *mode) {                          \
        REAL(name_)                                                            \
        if (!strpbrk(mode, "wa+"))                                             \
            return real_##name_(path, mode);                                   \
        WHOLE("open", AT_FDCWD, path, 0, NULL, real_##name_(path, mode))       \
    }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int fd, const void *bytes, size_t size) {
    REAL(write)
    switch (gate("write", fd, "", size)) {
    case REFUSED:
        return -1;
    case HALF:
        if (real_write(fd, bytes, size / 2) >= 0 || size)
            die();
    case GO_ON:
        break;
    }
    return real_write(fd, bytes, size);
}

#define PWRITE(name_, offset_t)                                                \
    ssize_t name_(int fd, const void *bytes, size_t size, offset_t offset) {   \
        REAL(name_)                                                            \
        switch (gate("write", fd, "", size)) {                                 \
        case REFUSED:                                                          \
            return -1;                                                         \
        case HALF:                                                             \
            if (real_##name_(fd, bytes, size / 2, offset) >= 0 || size)        \
                die();                                                         \
        case GO_ON:                                                            \
            break;                                                             \
        }                                                                      \
        return real_##name_(fd, bytes, size, offset);                          \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

static long total(const struct iovec *parts, int count) {
    long bytes = 0;
    for (int i = 0; i < count; i++)
        bytes += parts[i].iov_len;
    return bytes;
}

/* Half of several buffers: half of the first. */
ssize_t writev(int fd, const struct iovec *parts, int count) {
    REAL(writev)
    REAL(write)
    switch (gate("write", fd, "", total(parts, count))) {
    case REFUSED:
        return -1;
    case HALF:
        if (count == 0 || real_write(fd, parts[0].iov_base, parts[0].iov_len / 2) >= -1)
            die();
    case GO_ON:
        break;
    }
    return real_writev(fd, parts, count);
}

#define PWRITEV(name_, offset_t)                                               \
    ssize_t name_(int fd, const struct iovec *parts, int count, offset_t offset) { \
        REAL(name_)                                                            \
        WHOLE("write", fd, "", total(parts, count), -1, real_##name_(fd, parts, count, offset)) \
    }
PWRITEV(pwritev, off_t)
PWRITEV(pwritev64, off64_t)

#define SENDFILE(name_, offset_t)                                              \
    ssize_t name_(int out, int in, offset_t *offset, size_t size) {            \
        REAL(name_)                                                            \
        switch (gate("sendfile", out, "", size)) {                             \
        case REFUSED:                                                          \
            return -1;                                                         \
        case HALF:                                                             \
            if (real_##name_(out, in, offset, size / 2) >= -1)                 \
                die();                                                         \
        case GO_ON:                                                            \
            break;                                                             \
        }                                                                      \
        return real_##name_(out, in, offset, size);                            \
    }
ssize_t sendfile(int, int, off_t *, size_t);
ssize_t sendfile64(int, int, off64_t *, size_t);
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)

ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    REAL(copy_file_range)
    WHOLE("copy_file_range", out, "", size, -1, real_copy_file_range(in, from, out, to, size, flags))
}

#define ON_FILE(operation, name_, parameters, ...)                             \
    int name_ parameters {                                                     \
        REAL(name_)                                                            \
        WHOLE(operation, fd, "", 0, -1, real_##name_(__VA_ARGS__))             \
    }
ON_FILE("fsync", fsync, (int fd), fd)
ON_FILE("fsync", fdatasync, (int fd), fd)
ON_FILE("ftruncate", ftruncate, (int fd, off_t size), fd, size)
ON_FILE("ftruncate", ftruncate64, (int fd, off64_t size), fd, size)
ON_FILE("fallocate", fallocate, (int fd, int mode, off_t from, off_t size), fd, mode, from, size)
ON_FILE("fallocate", fallocate64, (int fd, int mode, off64_t from, off64_t size), fd, mode, from, size)
ON_FILE("chmod", fchmod, (int fd, mode_t mode), fd, mode)

/* posix_fallocate returns its error. */
int posix_fallocate(int fd, off_t from, off_t size) {
    REAL(posix_fallocate)
    WHOLE("fallocate", fd, "", size, errno, real_posix_fallocate(fd, from, size))
}

#define ON_PATH(operation, name_, dirfd, path, parameters, ...)                \
    int name_ parameters {                                                     \
        REAL(name_)                                                            \
        WHOLE(operation, dirfd, path, 0, -1, real_##name_(__VA_ARGS__))        \
    }
ON_PATH("truncate", truncate, AT_FDCWD, path, (const char *path, off_t size), path, size)
ON_PATH("truncate", truncate64, AT_FDCWD, path, (const char *path, off64_t size), path, size)
ON_PATH("mkdir", mkdir, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH("mkdir", mkdirat, at, path, (int at, const char *path, mode_t mode), at, path, mode)
ON_PATH("rmdir", rmdir, AT_FDCWD, path, (const char *path), path)
ON_PATH("unlink", unlink, AT_FDCWD, path, (const char *path), path)
ON_PATH("unlink", remove, AT_FDCWD, path, (const char *path), path)
ON_PATH((flags & AT_REMOVEDIR) ? "rmdir" : "unlink", unlinkat, at, path,
        (int at, const char *path, int flags), at, path, flags)
ON_PATH("rename", rename, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH("rename", renameat, at, to, (int from_at, const char *from, int at, const char *to), from_at,
        from, at, to)
ON_PATH("rename", renameat2, at, to,
        (int from_at, const char *from, int at, const char *to, unsigned flags), from_at, from, at, to,
        flags)
ON_PATH("link", link, AT_FDCWD, to, (const char *from, const char *to), from, to)
ON_PATH("link", linkat, at, to, (int from_at, const char *from, int at, const char *to, int flags),
        from_at, from, at, to, flags)
ON_PATH("symlink", symlink, AT_FDCWD, path, (const char *target, const char *path), target, path)
ON_PATH("symlink", symlinkat, at, path, (const char *target, int at, const char *path), target, at, path)
ON_PATH("chmod", chmod, AT_FDCWD, path, (const char *path, mode_t mode), path, mode)
ON_PATH("chmod", fchmodat, at, path, (int at, const char *path, mode_t mode, int flags), at, path, mode,
        flags)

/* Who calls renameat2 without libc's wrapper. */
long syscall(long number, ...) {
    REAL(syscall)
    va_list rest;
    long a[6];
    va_start(rest, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_renameat2)
        return renameat2((int)a[0], (const char *)a[1], (int)a[2], (const char *)a[3], (unsigned)a[4]);
    return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
