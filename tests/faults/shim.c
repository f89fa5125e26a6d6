/* Fails the n-th call of the system that concerns a folder: loaded before libc, armed from Python through ctypes.

   fault_watch(folder)          calls on this folder's files, by path or by descriptor, are counted from now on
   fault_arm(n, number, kinds)  the n-th call from now fails with this errno; with n negative, the -n-th and all behind it
   fault_counted()              calls since it was armed, or watched
   fault_last()                 name of the last call that was failed, or ""

   kinds: bits of READING, WRITING, CLOSING below; only calls of these kinds are counted. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/types.h>
#include <sys/uio.h>

#define READING 1
#define WRITING 2
#define CLOSING 4

static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;
static char folder[4096];
static char watched[65536];
static long counted, at;
static int number, kinds;
static const char *last = "";

void fault_watch(const char *path) { strncpy(folder, path, sizeof folder - 1); counted = 0; at = 0; }
void fault_arm(long n, int error, int which) { counted = 0; at = n; number = error; kinds = which; last = ""; }
long fault_counted(void) { return counted; }
const char *fault_last(void) { return last; }

static int open_inside(int fd) { return fd >= 0 && fd < (int)sizeof watched && watched[fd]; }
static int inside(const char *path) {
    if (!folder[0] || !path) return 0;
    if (!strncmp(path, "/proc/self/fd/", 14)) return open_inside(atoi(path + 14)); /* opened again by number */
    return !strncmp(path, folder, strlen(folder));
}

static int fails(int concerns, int kind, const char *name) {
    int failing = 0;
    if (!concerns || !(kinds & kind)) return 0;
    pthread_mutex_lock(&guard);
    counted++;
    failing = at > 0 ? counted == at : at < 0 && counted >= -at;
    if (failing) last = name;
    pthread_mutex_unlock(&guard);
    if (failing) errno = number;
    return failing;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) *(void **)&real = dlsym(RTLD_NEXT, #name)
#define CALL(type, name, kind, concerns, declared, passed, ...) \
    type name declared { REAL(type, name, __VA_ARGS__); return fails(concerns, kind, #name) ? -1 : real passed; }

#define OPEN(name)                                                                                     \
    int name(const char *path, int flags, ...) {                                                       \
        REAL(int, name, const char *, int, ...);                                                       \
        va_list list; va_start(list, flags); mode_t mode = va_arg(list, mode_t); va_end(list);         \
        int kind = flags & (O_WRONLY | O_RDWR | O_CREAT) ? WRITING : READING;                           \
        if (fails(inside(path), kind, #name)) return -1;                                               \
        int fd = real(path, flags, mode);                                                              \
        if (fd >= 0 && fd < (int)sizeof watched) watched[fd] = (char)inside(path);                     \
        return fd;                                                                                     \
    }
OPEN(open)
OPEN(open64)

#define BOTH(type, name, kind, concerns, declared, passed, ...)        \
    CALL(type, name, kind, concerns, declared, passed, __VA_ARGS__)    \
    CALL(type, name##64, kind, concerns, declared, passed, __VA_ARGS__)

CALL(ssize_t, read, READING, open_inside(fd), (int fd, void *b, size_t n), (fd, b, n), int, void *, size_t)
CALL(ssize_t, write, WRITING, open_inside(fd), (int fd, const void *b, size_t n), (fd, b, n), int, const void *, size_t)
BOTH(ssize_t, pread, READING, open_inside(fd), (int fd, void *b, size_t n, off_t o), (fd, b, n, o),
     int, void *, size_t, off_t)
BOTH(ssize_t, pwrite, WRITING, open_inside(fd), (int fd, const void *b, size_t n, off_t o), (fd, b, n, o),
     int, const void *, size_t, off_t)
BOTH(ssize_t, preadv, READING, open_inside(fd), (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o),
     int, const struct iovec *, int, off_t)
CALL(ssize_t, preadv64v2, READING, open_inside(fd), (int fd, const struct iovec *v, int n, off_t o, int f),
     (fd, v, n, o, f), int, const struct iovec *, int, off_t, int)
BOTH(int, ftruncate, WRITING, open_inside(fd), (int fd, off_t n), (fd, n), int, off_t)
CALL(int, fstat64, READING, open_inside(fd), (int fd, struct stat64 *s), (fd, s), int, struct stat64 *)
CALL(int, stat64, READING, inside(p), (const char *p, struct stat64 *s), (p, s), const char *, struct stat64 *)
CALL(int, statvfs64, READING, inside(p), (const char *p, struct statvfs64 *s), (p, s), const char *, struct statvfs64 *)
CALL(int, fsync, WRITING, open_inside(fd), (int fd), (fd), int)
CALL(int, mkdir, WRITING, inside(p), (const char *p, mode_t m), (p, m), const char *, mode_t)
CALL(int, rename, WRITING, inside(a), (const char *a, const char *b), (a, b), const char *, const char *)
CALL(int, unlink, WRITING, inside(p), (const char *p), (p), const char *)
CALL(int, flock, WRITING, open_inside(fd), (int fd, int o), (fd, o), int, int)
void *opendir(const char *p) {
    REAL(void *, opendir, const char *);
    return fails(inside(p), READING, "opendir") ? 0 : real(p);
}

/* posix_fallocate returns the number and leaves errno alone */
#define ALLOCATE(name)                                                                 \
    int name(int fd, off_t start, off_t length) {                                      \
        REAL(int, name, int, off_t, off_t);                                            \
        return fails(open_inside(fd), WRITING, #name) ? number : real(fd, start, length); \
    }
ALLOCATE(posix_fallocate)
ALLOCATE(posix_fallocate64)

int close(int fd) {
    REAL(int, close, int);
    int was = open_inside(fd);
    if (was) watched[fd] = 0;
    int result = real(fd); /* closed even where it reports a failure, as on Linux */
    return fails(was, CLOSING, "close") ? -1 : result;
}
