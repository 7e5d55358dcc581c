// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * Tells what a KVM does with a 64-bit guest of a few instructions: breakpoints, single step, traps that
 * the instruction emulator of KVM lacks. One line for each; exit 1 when the set-up itself fails.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#define RAM_SIZE (4 << 20)
#define CODE 0x100000
#define BREAKPOINT (CODE + 0x10)
#define RF 0x10000
#define HOOKED (KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_HW_BP)

static uint8_t *ram;
static int vcpu;
static struct kvm_run *run;

static void must(const char *what, int result)
{
	if (result < 0)
		err(1, "%s", what);
}

static void memory(int vm)
{
	struct kvm_userspace_memory_region slot = { .memory_size = RAM_SIZE };

	ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (ram == MAP_FAILED)
		err(1, "mmap");
	slot.userspace_addr = (uintptr_t)ram;
	must("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot));
	/* One table each of levels 4, 3 and 2: the first 4 MiB, in 2 MiB pages, writable. */
	*(uint64_t *)(ram + 0x1000) = 0x2003;
	*(uint64_t *)(ram + 0x2000) = 0x3003;
	*(uint64_t *)(ram + 0x3000) = 0x000083;
	*(uint64_t *)(ram + 0x3008) = 0x200083;
	/* GDT at 0x4000: null, 64-bit code, data. */
	*(uint64_t *)(ram + 0x4008) = 0x00af9b000000ffff;
	*(uint64_t *)(ram + 0x4010) = 0x00cf93000000ffff;
	/* IDT at 0x5000: only #BP, to 0x100100. */
	memcpy(ram + 0x5000 + 3 * 16, "\x00\x01\x08\x00\x00\x8e\x10\x00", 8);
	memset(ram + CODE, 0x90, 0x20);
	memcpy(ram + CODE + 0x20, "\xe6\xf4", 2);	  /* out %al,$0xf4 */
	memcpy(ram + CODE + 0x80, "\xcc", 1);		  /* int3 */
	memcpy(ram + CODE + 0x90, "\x0f\x0b", 2);	  /* ud2, without a handler */
	memcpy(ram + CODE + 0x100, "\xe6\xf5", 2);	  /* out %al,$0xf5 */
	memcpy(ram + CODE + 0x200,
	       "\x0f\x57\xc0"				  /* xorps %xmm0,%xmm0 */
	       "\x66\x48\x0f\x7e\xc1"			  /* movq %xmm0,%rcx */
	       "\xf3\x48\x0f\xb8\xc1"			  /* popcnt %rcx,%rax */
	       "\xe6\xf6",				  /* out %al,$0xf6 */
	       15);
}

static void registers(void)
{
	struct kvm_segment code = { .limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = { .limit = ~0u, .selector = 16, .type = 3, .present = 1, .s = 1, .db = 1, .g = 1 };
	struct kvm_sregs s;

	must("KVM_GET_SREGS", ioctl(vcpu, KVM_GET_SREGS, &s));
	s.cr0 = 0x80050033;
	s.cr3 = 0x1000;
	s.cr4 = 0x620; /* PAE, OSFXSR, OSXMMEXCPT */
	s.efer = 0x500; /* LME, LMA */
	s.cs = code;
	s.ds = s.es = s.fs = s.gs = s.ss = data;
	s.gdt = (struct kvm_dtable){ .base = 0x4000, .limit = 0x17 };
	s.idt = (struct kvm_dtable){ .base = 0x5000, .limit = 0xfff };
	must("KVM_SET_SREGS", ioctl(vcpu, KVM_SET_SREGS, &s));
}

static void debug(uint32_t control)
{
	struct kvm_guest_debug d = { .control = control };

	if (control & KVM_GUESTDBG_USE_HW_BP) {
		d.arch.debugreg[0] = BREAKPOINT;
		d.arch.debugreg[7] = 0x402; /* G0, an instruction */
	}
	must("KVM_SET_GUEST_DEBUG", ioctl(vcpu, KVM_SET_GUEST_DEBUG, &d));
}

/* The debug state comes last: KVM steps only from where the vCPU stood when it was told to. */
static void go(uint64_t rip, uint64_t flags, uint32_t control)
{
	struct kvm_regs r = { .rip = rip, .rsp = 0x80000, .rflags = flags | 2 };

	must("KVM_SET_REGS", ioctl(vcpu, KVM_SET_REGS, &r));
	debug(control);
	must("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
}

static const char *port(void)
{
	static char text[32];

	if (run->exit_reason == KVM_EXIT_IO)
		snprintf(text, sizeof(text), "port %x", run->io.port);
	else
		snprintf(text, sizeof(text), "exit %u", run->exit_reason);
	return text;
}

static uint64_t pc(void)
{
	return run->exit_reason == KVM_EXIT_DEBUG ? run->debug.arch.pc : 0;
}

int main(void)
{
	static struct {
		struct kvm_cpuid2 head;
		struct kvm_cpuid_entry2 entries[256];
	} cpuid = { .head.nent = 256 };
	int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	int vm;

	must("/dev/kvm", kvm);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	must("KVM_CREATE_VM", vm);
	memory(vm);
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	must("KVM_CREATE_VCPU", vcpu);
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		err(1, "mmap of the vCPU");
	must("KVM_GET_SUPPORTED_CPUID", ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid));
	must("KVM_SET_CPUID2", ioctl(vcpu, KVM_SET_CPUID2, &cpuid));
	registers();

	go(CODE, 0, HOOKED);
	printf("breakpoint at %llx, dr6 hit %llx\n", (unsigned long long)pc(),
	       run->debug.arch.dr6 & 15ull);
	go(BREAKPOINT, 0, HOOKED);
	printf("again at %llx\n", (unsigned long long)pc());
	go(BREAKPOINT, RF, HOOKED);
	printf("with RF passed to %s\n", port());
	go(BREAKPOINT, 0, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP);
	printf("step to %llx\n", (unsigned long long)pc());
	go(CODE + 0x80, 0, 0);
	printf("int3 to its handler, %s\n", port());
	go(CODE + 0x200, 0, 0);
	printf("SSE and popcnt to %s\n", port());
	go(CODE + 0x90, 0, 0);
	printf("triple fault: %s\n", run->exit_reason == KVM_EXIT_SHUTDOWN ? "shutdown" : port());
	return 0;
}
