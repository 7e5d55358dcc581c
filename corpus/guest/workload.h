/* The board on which the workload's members post their progress; shared with the agent. */
#ifndef WORKLOAD_H
#define WORKLOAD_H

#include <stdint.h>

#define BOARD_PATH "/run/workload"
#define BOARD_MAGIC 0x6465666962776c64ULL
#define MAX_MEMBERS 12

struct member {
	char name[16];
	int pid;
	volatile uint32_t finished;     /* the member ended after its last check */
	volatile uint64_t progress;     /* operations completed and verified */
	volatile uint64_t errors;       /* wrong bytes, failed calls, lost numbers */
	char note[112];                 /* the first error, as text */
};

struct board {
	volatile uint64_t magic;        /* set last: the members below are all there */
	volatile uint32_t stop;         /* set by the agent: finish and check */
	uint32_t count;
	struct member members[MAX_MEMBERS];
};

#endif
