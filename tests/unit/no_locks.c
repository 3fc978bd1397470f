// flock as some network file systems answer it: with the error whose number is in FLOCK_ERRNO.
#include <errno.h>
#include <stdlib.h>

int flock(int descriptor, int operation) {
    const char *number = getenv("FLOCK_ERRNO");
    if (number == NULL || operation == 8) return 0;  // LOCK_UN
    errno = atoi(number);
    return -1;
}
