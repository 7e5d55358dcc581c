/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* Text to the serial port, the end of the machine, and the few functions that every program in C needs. */
#include "tiny.h"

const char linux_banner[] =
	"Linux version 0.1-tiny (this is no Linux: the tiny guest of defib's crash corpus; what it shares with Linux is in linux.h)\n";

void *memcpy(void *to, const void *from, size_t count)
{
	void *at = to;
	asm volatile("rep movsb" : "+D"(at), "+S"(from), "+c"(count) : : "memory");
	return to;
}

void *memset(void *to, int byte, size_t count)
{
	void *at = to;
	asm volatile("rep stosb" : "+D"(at), "+c"(count) : "a"(byte) : "memory");
	return to;
}

int strcmp(const char *a, const char *b)
{
	for (; *a && *a == *b; a++, b++)
		;
	return *a - *b;
}
EXPORT_SYMBOL(strcmp);

static void put(char c)
{
	outb(0x3f8, c);
}

static void put_number(u64 n, unsigned base)
{
	char digits[20];
	int count = 0;
	do {
		digits[count++] = "0123456789abcdef"[n % base];
		n /= base;
	} while (n);
	while (count)
		put(digits[--count]);
}

/* %s, %d, %u, %x, with l for 64 bits. */
static void vprintk(const char *format, __builtin_va_list list)
{
	for (; *format; format++) {
		int wide = 0;
		if (*format != '%') {
			put(*format);
			continue;
		}
		while (*++format == 'l')
			wide = 1;
		if (*format == 's') {
			for (const char *s = __builtin_va_arg(list, const char *); *s; s++)
				put(*s);
		} else if (*format == 'd') {
			long n = wide ? __builtin_va_arg(list, long) : __builtin_va_arg(list, int);
			if (n < 0)
				put('-');
			put_number(n < 0 ? -n : n, 10);
		} else {
			u64 n = wide ? __builtin_va_arg(list, u64) : __builtin_va_arg(list, u32);
			put_number(n, *format == 'x' ? 16 : 10);
		}
	}
}

static spinlock_t print_lock;

void printk(const char *format, ...)
{
	__builtin_va_list list;
	u64 flags = _raw_spin_lock_irqsave(&print_lock);
	__builtin_va_start(list, format);
	vprintk(format, list);
	__builtin_va_end(list);
	_raw_spin_unlock_irqrestore(&print_lock, flags);
}
EXPORT_SYMBOL(printk);

/* QEMU's isa-debug-exit, and the minimal VMM's. */
void exit_machine(int code)
{
	outb(0xf4, code);
	for (;;)
		asm volatile("cli; hlt");
}

/* Waits for another CPU's line, but not for long: whoever crashed may hold the lock. */
noinline void panic(const char *format, ...)
{
	__builtin_va_list list;
	local_irq_disable();
	for (int i = 0; i < 20000 && __atomic_exchange_n(&print_lock.raw_lock.locked, 1, __ATOMIC_ACQUIRE); i++)
		cpu_relax();
	__builtin_va_start(list, format);
	vprintk("Kernel panic - not syncing: ", list);
	vprintk(format, list);
	__builtin_va_end(list);
	put('\n');
	exit_machine(EXIT_PANIC);
}
EXPORT_SYMBOL(panic);
