/* Counts the calls that change files under one folder, and lets one of them be the last, or fail.

   Loaded by LD_PRELOAD before the C library. `faults_arm` is called from Python (ctypes) in the rank that is to be hit;
   the calls of all its threads count. A call that is killed has not happened, but for a write, of which half has. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { COUNT, KILL, FAIL };

static char folder[PATH_MAX];
static int target, action;
static atomic_int calls;
static int by_kind[3]; /* writes, fsyncs, names (rename, unlink, rmdir) */

void faults_arm(const char *path, int number, int what) {
    action = what, target = number, calls = 0;
    memset(by_kind, 0, sizeof by_kind);
    snprintf(folder, sizeof folder, "%s", path);
}

int faults_calls(int kind) { return kind < 0 ? calls : by_kind[kind]; }

static int is_inside(const char *path) { return folder[0] && !strncmp(path, folder, strlen(folder)); }

static int is_of(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_inside(path);
}

static int is_hit(int kind) {
    by_kind[kind]++;
    return atomic_fetch_add(&calls, 1) + 1 == target && action != COUNT;
}

static int die_or_fail(void) {
    if (action == KILL) kill(getpid(), SIGKILL);
    errno = ENOSPC;
    return -1;
}

#define NEXT(name, type) ((type)dlsym(RTLD_NEXT, name))

ssize_t write(int descriptor, const void *data, size_t size) {
    static ssize_t (*next)(int, const void *, size_t);
    int saved = errno;
    if (!next) next = NEXT("write", ssize_t (*)(int, const void *, size_t));
    if (is_of(descriptor) && is_hit(0)) {
        next(descriptor, data, size / 2);
        return die_or_fail();
    }
    errno = saved;
    return next(descriptor, data, size);
}

int fsync(int descriptor) {
    static int (*next)(int);
    if (!next) next = NEXT("fsync", int (*)(int));
    return is_of(descriptor) && is_hit(1) ? die_or_fail() : next(descriptor);
}

int rename(const char *old, const char *new) {
    static int (*next)(const char *, const char *);
    if (!next) next = NEXT("rename", int (*)(const char *, const char *));
    return is_inside(new) && is_hit(2) ? die_or_fail() : next(old, new);
}

int unlink(const char *path) {
    static int (*next)(const char *);
    if (!next) next = NEXT("unlink", int (*)(const char *));
    return is_inside(path) && is_hit(2) ? die_or_fail() : next(path);
}

int rmdir(const char *path) {
    static int (*next)(const char *);
    if (!next) next = NEXT("rmdir", int (*)(const char *));
    return is_inside(path) && is_hit(2) ? die_or_fail() : next(path);
}
