// Interposed system calls that count the accesses to files under a prefix, and let one of them fail.
// Loaded with LD_PRELOAD; controlled from Python through ctypes.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST 20000
#define KILL -1
#define SHORT -2

static char prefix[PATH_MAX];
static size_t length;
static int armed, victim, fault, calls;
static struct {
  char call[16];
  char path[240];
} record[MOST];

int faults_calls(void) { return calls; }
const char *faults_call(int i) { return record[i].call; }
const char *faults_path(int i) { return record[i].path; }

// Count accesses under `where` from now on, and let number `which` (from 0; -1: none) fail: an errno, KILL or SHORT.
void faults_arm(const char *where, int which, int how) {
  snprintf(prefix, sizeof prefix, "%s", where);
  length = strlen(prefix);
  victim = which;
  fault = how;
  calls = 0;
  armed = 1;
}

void faults_disarm(void) { armed = 0; }

// 0: go on as usual; 1: fail with errno set; 2: transfer a part only.
static int met(const char *call, const char *path) {
  if (!armed || !path || strncmp(path, prefix, length)) return 0;
  int mine = calls++;
  if (mine < MOST) {
    snprintf(record[mine].call, sizeof record[mine].call, "%s", call);
    snprintf(record[mine].path, sizeof record[mine].path, "%s", path + length);
  }
  if (mine != victim) return 0;
  if (fault == KILL) kill(getpid(), SIGKILL);
  if (fault == SHORT) return 2;
  errno = fault;
  return 1;
}

static int met_at(const char *call, int folder, const char *path) {
  char whole[PATH_MAX], link[64];
  if (!armed || !path) return 0;
  if (path[0] == '/' || folder == AT_FDCWD) return met(call, path);
  snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
  ssize_t size = readlink(link, whole, sizeof whole - 1);
  if (size < 0) return 0;
  snprintf(whole + size, sizeof whole - size, "/%s", path);
  return met(call, whole);
}

static int met_fd(const char *call, int fd) {
  char path[PATH_MAX], link[64];
  if (!armed || fd < 0) return 0;
  int before = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t size = readlink(link, path, sizeof path - 1);
  errno = before;
  if (size < 0) return 0;
  path[size] = 0;
  return met(call, path);
}

#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define MODE \
  mode_t mode = 0; \
  if (flags & (O_CREAT | __O_TMPFILE)) { \
    va_list list; \
    va_start(list, flags); \
    mode = va_arg(list, mode_t); \
    va_end(list); \
  }
#define OPENING ((flags & O_ACCMODE) == O_RDONLY ? "open" : "create")

int open(const char *path, int flags, ...) {
  NEXT(open);
  MODE;
  return met(OPENING, path) ? -1 : next(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
  NEXT(open64);
  MODE;
  return met(OPENING, path) ? -1 : next(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
  NEXT(openat);
  MODE;
  return met_at(OPENING, folder, path) ? -1 : next(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
  NEXT(openat64);
  MODE;
  return met_at(OPENING, folder, path) ? -1 : next(folder, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
  NEXT(fopen);
  return met(mode[0] == 'r' ? "open" : "create", path) ? NULL : next(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
  NEXT(fopen64);
  return met(mode[0] == 'r' ? "open" : "create", path) ? NULL : next(path, mode);
}
DIR *opendir(const char *path) {
  NEXT(opendir);
  return met("opendir", path) ? NULL : next(path);
}

#define PART(size) ((size) > 1 ? (size) / 2 : (size))
#define TRANSFER(kind, name, size, ...) \
  NEXT(name); \
  int how = met_fd(kind, fd); \
  if (how == 1) return -1; \
  if (how == 2) size = PART(size); \
  return next(__VA_ARGS__)

ssize_t read(int fd, void *data, size_t size) { TRANSFER("read", read, size, fd, data, size); }
ssize_t pread(int fd, void *data, size_t size, off_t at) { TRANSFER("read", pread, size, fd, data, size, at); }
ssize_t pread64(int fd, void *data, size_t size, off64_t at) { TRANSFER("read", pread64, size, fd, data, size, at); }
ssize_t write(int fd, const void *data, size_t size) { TRANSFER("write", write, size, fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { TRANSFER("write", pwrite, size, fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
  TRANSFER("write", pwrite64, size, fd, data, size, at);
}
size_t fread(void *data, size_t item, size_t count, FILE *file) {
  NEXT(fread);
  int how = met_fd("read", fileno(file));
  if (how == 1) return 0;
  return next(data, item, how == 2 ? PART(count) : count, file);
}

int fsync(int fd) {
  NEXT(fsync);
  return met_fd("fsync", fd) ? -1 : next(fd);
}
int fdatasync(int fd) {
  NEXT(fdatasync);
  return met_fd("fsync", fd) ? -1 : next(fd);
}
int ftruncate(int fd, off_t size) {
  NEXT(ftruncate);
  return met_fd("truncate", fd) ? -1 : next(fd, size);
}
int ftruncate64(int fd, off64_t size) {
  NEXT(ftruncate64);
  return met_fd("truncate", fd) ? -1 : next(fd, size);
}
int flock(int fd, int how) {
  NEXT(flock);
  return met_fd("lock", fd) ? -1 : next(fd, how);
}
int rename(const char *from, const char *to) {
  NEXT(rename);
  return met("rename", to) ? -1 : next(from, to);
}
int renameat(int a, const char *from, int b, const char *to) {
  NEXT(renameat);
  return met_at("rename", b, to) ? -1 : next(a, from, b, to);
}
int unlink(const char *path) {
  NEXT(unlink);
  return met("unlink", path) ? -1 : next(path);
}
int unlinkat(int folder, const char *path, int flags) {
  NEXT(unlinkat);
  return met_at("unlink", folder, path) ? -1 : next(folder, path, flags);
}
int rmdir(const char *path) {
  NEXT(rmdir);
  return met("unlink", path) ? -1 : next(path);
}
int mkdir(const char *path, mode_t mode) {
  NEXT(mkdir);
  return met("mkdir", path) ? -1 : next(path, mode);
}
void *mmap(void *at, size_t size, int protection, int flags, int fd, off_t offset) {
  NEXT(mmap);
  return met_fd("mmap", flags & MAP_ANONYMOUS ? -1 : fd) ? MAP_FAILED
                                                         : next(at, size, protection, flags, fd, offset);
}
void *mmap64(void *at, size_t size, int protection, int flags, int fd, off64_t offset) {
  NEXT(mmap64);
  return met_fd("mmap", flags & MAP_ANONYMOUS ? -1 : fd) ? MAP_FAILED
                                                         : next(at, size, protection, flags, fd, offset);
}
