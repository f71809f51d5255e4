/* The firmware as a process: it speaks the protocol on standard input and output, a serial line or a TCP socket.
 *
 *     firmware [--tcp PORT | --tty DEVICE[:BAUD]] [--flash FILE]
 *
 * --tcp listens on 127.0.0.1, one connection after another; port 0 takes a free one. Which one is said on stderr.
 * --flash: what is saved goes to this file, which has the bytes of a board's flash.
 */
#define _DEFAULT_SOURCE
#define _FILE_OFFSET_BITS 64
#include "ac_app.h"
#include "ac_project.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static ac_app app;
static uint32_t state[AC_PROJECT_STATE_BYTES / 4], arena[AC_PROJECT_ARENA_BYTES / 4];
#if AC_PROJECT_SLOT_BYTES
static uint32_t slot[AC_PROJECT_SLOT_BYTES / 4];
#endif

/* What was written goes out when the app next looks for something to read. */
static struct {
    int in, out, closed;
    size_t size;
    uint8_t bytes[1 << 16];
} line;

static void flush(void) {
    for (size_t at = 0; at < line.size && !line.closed;) {
        ssize_t n = write(line.out, line.bytes + at, line.size - at);
        if (n > 0) at += (size_t)n;
        else if (n < 0 && (errno == EAGAIN || errno == EINTR)) poll(&(struct pollfd){line.out, POLLOUT, 0}, 1, -1);
        else line.closed = 1;
    }
    line.size = 0;
}

static int line_read(void *user, uint8_t *bytes, int max) {
    (void)user;
    flush();
    if (line.closed || poll(&(struct pollfd){line.in, POLLIN, 0}, 1, 0) <= 0) return 0;
    ssize_t n = read(line.in, bytes, (size_t)max);
    if (n == 0 || (n < 0 && errno != EINTR && errno != EAGAIN)) line.closed = 1;
    return n > 0 ? (int)n : 0;
}

static int line_write(void *user, const uint8_t *bytes, int n) {
    (void)user;
    if (line.size + (size_t)n > sizeof line.bytes) flush();
    memcpy(line.bytes + line.size, bytes, (size_t)n);
    line.size += (size_t)n;
    return n;
}

static uint32_t microseconds(void *user) {
    struct timespec at;
    (void)user;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return (uint32_t)((uint64_t)at.tv_sec * 1000000u + (uint64_t)at.tv_nsec / 1000u);
}

/* ---- flash, in a file: pages are erased to ones, and programming clears bits ----------------------------------- */

enum { PAGE = 4096, UNIT = 8, SLOTS = 2, SLOT_PAGES = (AC_PROJECT_DELTA_BYTES + 4 * 64 + PAGE - 1) / PAGE };

static int flash_file = -1;

static int flash_read(void *argument, uint32_t address, void *to, uint32_t bytes) {
    (void)argument;
    return pread(flash_file, to, bytes, address) != (ssize_t)bytes;
}

static int flash_erase(void *argument, uint32_t page) {
    uint8_t ones[PAGE];
    (void)argument;
    memset(ones, 0xFF, sizeof ones);
    return pwrite(flash_file, ones, PAGE, (off_t)page * PAGE) != PAGE || fsync(flash_file);
}

static int flash_program(void *argument, uint32_t address, const void *from, uint32_t bytes) {
    uint8_t chunk[UNIT];
    for (uint32_t at = 0; at < bytes; at += UNIT) {
        if (flash_read(argument, address + at, chunk, UNIT)) return 1;
        for (uint32_t i = 0; i < UNIT; i++) chunk[i] &= ((const uint8_t *)from)[at + i];
        if (pwrite(flash_file, chunk, UNIT, address + at) != UNIT) return 1;
    }
    return fsync(flash_file);
}

static const ac_flash flash = {
    NULL, flash_read, flash_erase, flash_program, NULL, PAGE, UNIT, SLOTS * SLOT_PAGES};

static int open_flash(const char *path) {
    const off_t size = (off_t)flash.pages * PAGE;
    flash_file = open(path, O_RDWR | O_CREAT, 0600);
    if (flash_file < 0) return 1;
    for (off_t end = lseek(flash_file, 0, SEEK_END); end < size; end += PAGE)
        if (end % PAGE || flash_erase(NULL, (uint32_t)(end / PAGE))) return 1;
    return 0;
}

static ac_board board = {
    .read = line_read, .write = line_write, .counter = microseconds, .receive_bytes = 1 << 15};

static void start(void) {
    ac_app_init(&app, &board, ac_project_program, AC_PROJECT_PROGRAM_BYTES, state, AC_PROJECT_STATE_BYTES, arena,
                AC_PROJECT_ARENA_BYTES);
#if AC_PROJECT_SLOT_BYTES
    ac_app_slot(&app, slot, sizeof slot);
#endif
}

/* Answer until the other side hangs up. */
static void serve(int in, int out) {
    line.in = in;
    line.out = out;
    line.closed = 0;
    while (!line.closed) {
        int done = ac_app_poll(&app);
        if (done < 0) start();
        if (done == 0 && !line.closed) poll(&(struct pollfd){in, POLLIN, 0}, 1, -1);
    }
}

static int complain(const char *what) {
    perror(what);
    return 1;
}

static int serve_tcp(const char *port) {
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(port))};
    socklen_t size = sizeof at;
    int one = 1, door = socket(AF_INET, SOCK_STREAM, 0);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    setsockopt(door, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(door, (struct sockaddr *)&at, sizeof at) || listen(door, 1)) return complain(port);
    getsockname(door, (struct sockaddr *)&at, &size);
    fprintf(stderr, "listening on 127.0.0.1:%d\n", ntohs(at.sin_port));
    for (;;) {
        int peer = accept(door, NULL, NULL);
        if (peer < 0) return complain("accept");
        setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        serve(peer, peer);
        close(peer);
    }
}

static speed_t speed_of(const char *baud) {
    static const struct {
        int baud;
        speed_t speed;
    } known[] = {{9600, B9600}, {57600, B57600}, {115200, B115200}, {230400, B230400}, {460800, B460800}, {921600, B921600}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].baud == atoi(baud)) return known[i].speed;
    return B115200;
}

static int serve_tty(char *device) {
    struct termios how;
    char *baud = strrchr(device, ':');
    if (baud) *baud++ = 0;
    int tty = open(device, O_RDWR | O_NOCTTY);
    if (tty < 0 || tcgetattr(tty, &how)) return complain(device);
    cfmakeraw(&how);
    cfsetspeed(&how, speed_of(baud ? baud : "115200"));
    if (tcsetattr(tty, TCSANOW, &how)) return complain(device);
    serve(tty, tty);
    return 0;
}

int main(int argc, char **argv) {
    char *port = NULL, *device = NULL, *kept = NULL;
    int known = argc % 2;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--tcp")) port = argv[i + 1];
        else if (!strcmp(argv[i], "--tty")) device = argv[i + 1];
        else if (!strcmp(argv[i], "--flash")) kept = argv[i + 1];
        else known = 0;
    }
    if (!known || (port && device)) {
        fprintf(stderr, "usage: %s [--tcp PORT | --tty DEVICE[:BAUD]] [--flash FILE]\n", argv[0]);
        return 2;
    }
    if (kept && open_flash(kept)) return complain(kept);
    board.flash = kept ? &flash : NULL;
    board.slots = SLOTS;
    signal(SIGPIPE, SIG_IGN);
    line.closed = 1; /* what the app says before somebody is there waits until then */
    start();
    if (port) return serve_tcp(port);
    if (device) return serve_tty(device);
    serve(STDIN_FILENO, STDOUT_FILENO);
    return 0;
}
