/* Counts the calls of a process that change (or read) files below one folder, and fails or kills it at the n-th.

   gcc -shared -fPIC -O1 -o shim.so shim.c -ldl

   Loaded before the C library (LD_PRELOAD). `faults_arm(root, reads, forks, at, error, log)` begins the count, of calls that change
   files or, with `reads`, of those that open them for reading and read them: at call number `at` the process is killed before
   the call is made (error 0), or the call fails with that errno. `at` 0 only counts. Every counted call is a line in `log`,
   which lies elsewhere: the number, the call and the file. Only the process that was armed counts, or, with `forks`, only those
   forked from it, each by itself. After `faults_stop(asked, go)`, the names of two FIFOs, the process writes a byte to the first before
   each counted call, and waits for one from the other, while the tree lies there as a kill would leave it. After
   `faults_signal(number)` a thread sends itself that signal before each counted call, whose handler can note where it is. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int armed, reading, at, error_code, log_fd = -1, asked_fd = -1, go_fd = -1, site_signal;
static int count, forks;
static pid_t armed_process;
static pthread_mutex_t one_at_a_time = PTHREAD_MUTEX_INITIALIZER;

void faults_stop(const char *asked, const char *go) {
  asked_fd = syscall(SYS_openat, AT_FDCWD, asked, O_RDWR | O_CLOEXEC, 0);
  go_fd = syscall(SYS_openat, AT_FDCWD, go, O_RDWR | O_CLOEXEC, 0);
}

void faults_signal(int number) {
  stack_t none = {.ss_flags = SS_DISABLE};
  sigaltstack(&none, NULL);  /* of a few kilobytes, where the calls of this file would not fit */
  site_signal = number;
}

void faults_arm(const char *folder, int reads, int in_forks, int number, int code, const char *log) {
  snprintf(root, sizeof root, "%s", folder);
  log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND, 0644);
  count = 0; forks = in_forks; armed_process = getpid(); at = number; error_code = code; reading = reads; armed = 1;
}

static int below(const char *path) {
  size_t length = strlen(root);
  return strncmp(path, root, length) == 0 && (path[length] == '/' || path[length] == 0);
}

static int path_counts(int folder, const char *path) {
  char whole[PATH_MAX * 2], from[PATH_MAX];
  if (path == NULL) return 0;
  if (path[0] == '/') return below(path);
  if (folder == AT_FDCWD) {
    if (getcwd(from, sizeof from) == NULL) return 0;
  } else {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    ssize_t length = readlink(link, from, sizeof from - 1);
    if (length < 0) return 0;
    from[length] = 0;
  }
  snprintf(whole, sizeof whole, "%s/%s", from, path);
  return below(whole);
}

static int file_counts(int file, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  if (length <= 0) return 0;
  path[length] = 0;
  return below(path);
}

/* 1: the call shall fail, errno is set */
static int hit(const char *name, const char *what) {
  if ((getpid() != armed_process) != forks) return 0;
  pthread_mutex_lock(&one_at_a_time);
  int number = ++count;
  if (log_fd >= 0) {
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%d %s %s\n", number, name, what);
    if (length > (int)sizeof line - 1) length = sizeof line - 1;
    syscall(SYS_write, log_fd, line, length);
  }
  if (site_signal) raise(site_signal);
  if (asked_fd >= 0) {
    char byte = 's';
    syscall(SYS_write, asked_fd, &byte, 1);
    while (syscall(SYS_read, go_fd, &byte, 1) != 1) {}
  }
  pthread_mutex_unlock(&one_at_a_time);
  if (at == 0 || number != at) return 0;
  if (error_code == 0) {
    syscall(SYS_kill, getpid(), SIGKILL);
    for (;;) pause();
  }
  errno = error_code;
  return 1;
}

#define REAL(symbol) static __typeof__(&symbol) real; if (!real) real = (__typeof__(&symbol))dlsym(RTLD_NEXT, #symbol)
#define PATH_CALL(label, folder, path) if (armed && !reading && path_counts(folder, path) && hit(label, path)) return -1
#define FILE_CALL(label, file) char file_path[PATH_MAX]; if (armed && !reading && file_counts(file, file_path) && hit(label, file_path)) return -1
#define PATH_READ(label, folder, path) if (armed && reading && path_counts(folder, path) && hit(label, path)) return -1
#define FILE_READ(label, file) char file_path[PATH_MAX]; if (armed && reading && file_counts(file, file_path) && hit(label, file_path)) return -1

#define OPEN(symbol) \
  int symbol(const char *path, int flags, ...) { \
    REAL(symbol); \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    if (flags & (O_CREAT | O_TRUNC)) { PATH_CALL("open", AT_FDCWD, path); } else { PATH_READ("open", AT_FDCWD, path); } \
    return real(path, flags, mode); }
OPEN(open) OPEN(open64)

#define OPENAT(symbol) \
  int symbol(int folder, const char *path, int flags, ...) { \
    REAL(symbol); \
    va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
    if (flags & (O_CREAT | O_TRUNC)) { PATH_CALL("openat", folder, path); } else { PATH_READ("openat", folder, path); } \
    return real(folder, path, flags, mode); }
OPENAT(openat) OPENAT(openat64)

ssize_t read(int file, void *content, size_t size) {
  REAL(read); FILE_READ("read", file); return real(file, content, size); }
ssize_t pread(int file, void *content, size_t size, off_t offset) {
  REAL(pread); FILE_READ("pread", file); return real(file, content, size, offset); }
ssize_t pread64(int file, void *content, size_t size, off64_t offset) {
  REAL(pread64); FILE_READ("pread", file); return real(file, content, size, offset); }
ssize_t preadv(int file, const struct iovec *parts, int number, off_t offset) {
  REAL(preadv); FILE_READ("pread", file); return real(file, parts, number, offset); }
ssize_t preadv64(int file, const struct iovec *parts, int number, off64_t offset) {
  REAL(preadv64); FILE_READ("pread", file); return real(file, parts, number, offset); }

ssize_t write(int file, const void *content, size_t size) {
  REAL(write); FILE_CALL("write", file); return real(file, content, size); }
ssize_t pwrite(int file, const void *content, size_t size, off_t offset) {
  REAL(pwrite); FILE_CALL("pwrite", file);
  return real(file, content, size, offset); }
ssize_t pwrite64(int file, const void *content, size_t size, off64_t offset) {
  REAL(pwrite64); FILE_CALL("pwrite", file);
  return real(file, content, size, offset); }
ssize_t sendfile(int out, int in, off_t *offset, size_t size) {
  REAL(sendfile); FILE_CALL("sendfile", out);
  return real(out, in, offset, size); }
ssize_t sendfile64(int out, int in, off64_t *offset, size_t size) {
  REAL(sendfile64); FILE_CALL("sendfile", out);
  return real(out, in, offset, size); }
int ftruncate(int file, off_t size) {
  REAL(ftruncate); FILE_CALL("ftruncate", file); return real(file, size); }
int ftruncate64(int file, off64_t size) {
  REAL(ftruncate64); FILE_CALL("ftruncate", file); return real(file, size); }
int fsync(int file) { REAL(fsync); FILE_CALL("fsync", file); return real(file); }
int fdatasync(int file) { REAL(fdatasync); FILE_CALL("fdatasync", file); return real(file); }
int fchmod(int file, mode_t mode) { REAL(fchmod); FILE_CALL("fchmod", file); return real(file, mode); }

int rename(const char *from, const char *to) {
  REAL(rename); PATH_CALL("rename", AT_FDCWD, to); return real(from, to); }
int renameat(int a, const char *from, int b, const char *to) {
  REAL(renameat); PATH_CALL("renameat", b, to); return real(a, from, b, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
  REAL(renameat2); PATH_CALL("renameat2", b, to);
  return real(a, from, b, to, flags); }
int link(const char *from, const char *to) {
  REAL(link); PATH_CALL("link", AT_FDCWD, to); return real(from, to); }
int linkat(int a, const char *from, int b, const char *to, int flags) {
  REAL(linkat); PATH_CALL("linkat", b, to);
  return real(a, from, b, to, flags); }
int symlink(const char *from, const char *to) {
  REAL(symlink); PATH_CALL("symlink", AT_FDCWD, to); return real(from, to); }
int unlink(const char *path) { REAL(unlink); PATH_CALL("unlink", AT_FDCWD, path); return real(path); }
int unlinkat(int folder, const char *path, int flags) {
  REAL(unlinkat); PATH_CALL("unlinkat", folder, path); return real(folder, path, flags); }
int rmdir(const char *path) { REAL(rmdir); PATH_CALL("rmdir", AT_FDCWD, path); return real(path); }
int mkdir(const char *path, mode_t mode) {
  REAL(mkdir); PATH_CALL("mkdir", AT_FDCWD, path); return real(path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) {
  REAL(mkdirat); PATH_CALL("mkdirat", folder, path); return real(folder, path, mode); }
int chmod(const char *path, mode_t mode) {
  REAL(chmod); PATH_CALL("chmod", AT_FDCWD, path); return real(path, mode); }

ssize_t writev(int file, const struct iovec *parts, int number) {
  REAL(writev); FILE_CALL("writev", file); return real(file, parts, number); }
ssize_t pwritev(int file, const struct iovec *parts, int number, off_t offset) {
  REAL(pwritev); FILE_CALL("pwritev", file); return real(file, parts, number, offset); }
ssize_t pwritev64(int file, const struct iovec *parts, int number, off64_t offset) {
  REAL(pwritev64); FILE_CALL("pwritev", file); return real(file, parts, number, offset); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
  REAL(copy_file_range); FILE_CALL("copy_file_range", out); return real(in, from, out, to, size, flags); }
int fallocate(int file, int mode, off_t offset, off_t size) {
  REAL(fallocate); FILE_CALL("fallocate", file); return real(file, mode, offset, size); }
int fallocate64(int file, int mode, off64_t offset, off64_t size) {
  REAL(fallocate64); FILE_CALL("fallocate", file); return real(file, mode, offset, size); }
int futimens(int file, const struct timespec times[2]) {
  REAL(futimens); FILE_CALL("futimens", file); return real(file, times); }
int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
  REAL(utimensat); PATH_CALL("utimensat", folder, path); return real(folder, path, times, flags); }
int truncate(const char *path, off_t size) {
  REAL(truncate); PATH_CALL("truncate", AT_FDCWD, path); return real(path, size); }
int truncate64(const char *path, off64_t size) {
  REAL(truncate64); PATH_CALL("truncate", AT_FDCWD, path); return real(path, size); }

#define FOPEN(symbol) \
  FILE *symbol(const char *path, const char *mode) { \
    REAL(symbol); \
    int changes = strchr(mode, 'w') || strchr(mode, 'a') || strchr(mode, '+'); \
    if (armed && changes != reading && path_counts(AT_FDCWD, path) && hit("fopen", path)) return NULL; \
    return real(path, mode); }
FOPEN(fopen) FOPEN(fopen64)
