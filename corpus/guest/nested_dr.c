// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hardware breakpoints for guests of the lab's nested KVM. QEMU's emulated VMRUN (helper_vmrun(), seen in
 * 7.2) loads DR7 from the VMCB but arms no breakpoint: under TCG only a MOV to DR7 does that. So, right
 * before KVM enters its guest, with DR0 to DR3 already loaded by vcpu_enter_guest(), this moves to DR7
 * what the guest is to have, and 0 again after the exit, as KVM left it. A processor needs none of this.
 */
#include <linux/kprobes.h>
#include <linux/kvm_host.h>
#include <linux/module.h>

static int entering(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	/* The first argument of svm_vcpu_run(), in every version so far. */
	struct kvm_vcpu *vcpu = (struct kvm_vcpu *)regs->di;
	unsigned long dr7 = vcpu->guest_debug & KVM_GUESTDBG_USE_HW_BP ?
				    vcpu->arch.guest_debug_dr7 : vcpu->arch.dr7;

	/* Bits 0 to 7: the enable bits of the four breakpoints. */
	if (!(dr7 & 0xff))
		return 1;
	set_debugreg(dr7, 7);
	return 0;
}
NOKPROBE_SYMBOL(entering);

static int left(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	set_debugreg(0, 7);
	return 0;
}
NOKPROBE_SYMBOL(left);

static struct kretprobe probe = {
	.kp.symbol_name = "svm_vcpu_run",
	.entry_handler = entering,
	.handler = left,
	/* No more can be inside at a time than there are CPUs. */
	.maxactive = 64,
};

static int __init nested_dr_init(void)
{
	return register_kretprobe(&probe);
}

static void __exit nested_dr_exit(void)
{
	unregister_kretprobe(&probe);
}

module_init(nested_dr_init);
module_exit(nested_dr_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Hardware breakpoints for guests of an emulated SVM");
