// SPDX-License-Identifier: GPL-2.0-only
/*
 * A driver for QEMU's educational PCI device (docs/specs/edu.rst) whose interrupt handler faults, by
 * MSI or, with msi=0, by a level-triggered line: there the interrupt comes again at once if the handler
 * did not acknowledge it.
 */
#include <linux/completion.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/pci.h>

#include "crash.h"

#define EDU_IRQ_STATUS 0x24
#define EDU_IRQ_RAISE 0x60
#define EDU_IRQ_ACKNOWLEDGE 0x64

/* Renamed in v6.9. */
#ifndef PCI_IRQ_INTX
#define PCI_IRQ_INTX PCI_IRQ_LEGACY
#endif

static bool msi = true;
module_param(msi, bool, 0444);
MODULE_PARM_DESC(msi, "message-signalled interrupts instead of the line");

static bool threaded;
module_param(threaded, bool, 0444);
MODULE_PARM_DESC(threaded, "all is done in a thread, and the interrupt is masked until then");

struct ring {
	unsigned long head;
};

static struct card {
	void __iomem *registers;
	int irq;
	struct ring *ring;              /* never set: the mistake */
	spinlock_t lock;
	struct mutex mutex;
	int faulty, faulty_locked, faulty_thread; /* interrupts to be handled wrongly */
	bool storming;                  /* all of them */
	struct completion handled;
} card;

static irqreturn_t card_interrupt(int irq, void *data)
{
	struct card *c = data;
	u32 status = readl(c->registers + EDU_IRQ_STATUS);

	if (!status)
		return IRQ_NONE;
	if (c->faulty) {
		c->faulty--;
		WRITE_ONCE(c->ring->head, status); /* CRASH: irq */
	}
	if (c->storming)
		WRITE_ONCE(c->ring->head, status); /* CRASH: irq-storm */
	spin_lock(&c->lock);
	if (c->faulty_locked) {
		c->faulty_locked--;
		WRITE_ONCE(c->ring->head, status); /* CRASH: irq-spinlock */
	}
	writel(status, c->registers + EDU_IRQ_ACKNOWLEDGE);
	spin_unlock(&c->lock);
	complete(&c->handled);
	return IRQ_HANDLED;
}

/* The same in a thread, which may sleep. */
static irqreturn_t card_thread(int irq, void *data)
{
	struct card *c = data;
	u32 status = readl(c->registers + EDU_IRQ_STATUS);

	mutex_lock(&c->mutex);
	if (c->faulty_thread) {
		c->faulty_thread--;
		WRITE_ONCE(c->ring->head, status); /* CRASH: irq-thread */
	}
	writel(status, c->registers + EDU_IRQ_ACKNOWLEDGE);
	mutex_unlock(&c->mutex);
	complete(&c->handled);
	return IRQ_HANDLED;
}

static ssize_t card_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	struct card *c = &card;
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (error)
		return error;
	if (!c->registers)
		return -ENXIO;
	if (!strcmp(name, "irq"))
		c->faulty = 1;
	else if (!strcmp(name, "irq-spinlock"))
		c->faulty_locked = 1;
	else if (!strcmp(name, "irq-storm"))
		c->storming = true;
	else if (!strcmp(name, "irq-thread"))
		c->faulty_thread = 1;
	else
		return -EINVAL;
	writel(1, c->registers + EDU_IRQ_RAISE);
	return count;
}

static ssize_t card_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	struct card *c = &card;
	const char *wrong = crash_context();
	unsigned long flags;
	int free = 0, tries;

	if (!c->registers)
		return -ENXIO;
	/* Interrupts must still come, and the handler's lock must be free. */
	reinit_completion(&c->handled);
	/* Acknowledge what a faulting handler left raised, or no new MSI would be sent. */
	writel(~0u, c->registers + EDU_IRQ_ACKNOWLEDGE);
	writel(2, c->registers + EDU_IRQ_RAISE);
	if (!wrong && !wait_for_completion_timeout(&c->handled, HZ))
		wrong = "interrupts-dead";
	for (tries = 0; !wrong && !free && tries < CRASH_PATIENCE_MS; tries++) {
		free = spin_trylock_irqsave(&c->lock, flags);
		if (free)
			spin_unlock_irqrestore(&c->lock, flags);
		else
			msleep(1);
	}
	if (!wrong && !free)
		wrong = "spinlock";
	if (!wrong && !crash_trylock(mutex_trylock(&c->mutex)))
		wrong = "mutex";
	else if (!wrong)
		mutex_unlock(&c->mutex);
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations card_operations = {
	.owner = THIS_MODULE,
	.read = card_read,
	.write = card_write,
};

static struct miscdevice card_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_irq",
	.fops = &card_operations,
	.mode = 0666,
};

static int card_probe(struct pci_dev *device, const struct pci_device_id *id)
{
	struct card *c = &card;
	int error;

	/*
	 * QEMU's edu saves no state: in a guest restored from a snapshot its base address is gone, which
	 * the kernel has no reason to suspect.
	 */
	pci_write_config_dword(device, PCI_BASE_ADDRESS_0, pci_resource_start(device, 0));
	error = pcim_enable_device(device);
	if (!error)
		error = pcim_iomap_regions(device, 1, "crash_irq");
	if (error)
		return error;
	pci_set_master(device);
	c->registers = pcim_iomap_table(device)[0];
	error = pci_alloc_irq_vectors(device, 1, 1, msi ? PCI_IRQ_MSI : PCI_IRQ_INTX);
	if (error < 0)
		return error;
	c->irq = pci_irq_vector(device, 0);
	if (threaded)
		error = request_threaded_irq(c->irq, NULL, card_thread, IRQF_ONESHOT, "crash_irq", c);
	else
		error = request_irq(c->irq, card_interrupt, msi ? 0 : IRQF_SHARED, "crash_irq", c);
	if (error)
		pci_free_irq_vectors(device);
	return error;
}

static void card_remove(struct pci_dev *device)
{
	free_irq(card.irq, &card);
	pci_free_irq_vectors(device);
	card.registers = NULL;
}

static const struct pci_device_id card_ids[] = {
	{ PCI_DEVICE(0x1234, 0x11e8) },
	{ }
};
MODULE_DEVICE_TABLE(pci, card_ids);

static struct pci_driver card_driver = {
	.name = "crash_irq",
	.id_table = card_ids,
	.probe = card_probe,
	.remove = card_remove,
};

static int __init card_init(void)
{
	int error;

	spin_lock_init(&card.lock);
	mutex_init(&card.mutex);
	init_completion(&card.handled);
	error = pci_register_driver(&card_driver);
	if (error)
		return error;
	error = misc_register(&card_device);
	if (error)
		pci_unregister_driver(&card_driver);
	return error;
}

static void __exit card_exit(void)
{
	misc_deregister(&card_device);
	pci_unregister_driver(&card_driver);
}

module_init(card_init);
module_exit(card_exit);
MODULE_DESCRIPTION("Crash corpus: faults in an interrupt handler");
MODULE_LICENSE("GPL");
