/*
 * progress_poller PID ADDRESS SHORTEST_MS: watch a guest's progress from outside, every 0.1 ms.
 *
 * ADDRESS is where QEMU has the guest's `struct progress` (writing_guest.c). Standard output gets
 * one record for the first sample, one for each time without a heartbeat of at least SHORTEST_MS,
 * and one for the last sample, when standard input ends or the process is gone.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

struct progress {
    uint64_t heartbeat, position;
};

/* The heartbeat stopped after `before` and until `seen`; it went on after `still` and until `moved`.
 * Times of CLOCK_MONOTONIC, in seconds. */
struct gap {
    double before, seen, still, moved;
    struct progress at;
};

static double now(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static int sample(pid_t pid, uintptr_t address, struct progress *progress)
{
    struct iovec here = {progress, sizeof *progress};
    struct iovec there = {(void *)address, sizeof *progress};

    return process_vm_readv(pid, &here, 1, &there, 1, 0) == sizeof *progress;
}

static void report(const struct gap *gap)
{
    fwrite(gap, sizeof *gap, 1, stdout);
    fflush(stdout);
}

int main(int argc, char **argv)
{
    const struct sched_param priority = {.sched_priority = 1};
    struct pollfd end = {.fd = 0, .events = POLLIN};
    struct progress seen;
    struct gap gap;
    pid_t pid;
    uintptr_t address;
    double shortest, time;

    if (argc != 4)
        return 2;
    pid = atoi(argv[1]);
    address = strtoull(argv[2], NULL, 0);
    shortest = atof(argv[3]) / 1000;
    /* Where that is not permitted, the gaps have wider bounds. */
    sched_setscheduler(0, SCHED_FIFO, &priority);
    prctl(PR_SET_TIMERSLACK, 1000);
    if (!sample(pid, address, &seen))
        return 1;
    time = now();
    gap = (struct gap){time, time, time, time, seen};
    report(&gap);
    while (poll(&end, 1, 0) == 0 && sample(pid, address, &seen)) {
        double last = time;

        time = now();
        if (seen.heartbeat == gap.at.heartbeat) {
            gap.still = time;
        } else {
            gap.moved = time;
            if (gap.moved - gap.before >= shortest)
                report(&gap);
            gap = (struct gap){last, time, time, time, seen};
        }
        usleep(100);
    }
    gap.moved = now(); /* a gap that has not ended counts too */
    report(&gap);
    return 0;
}
