// SPDX-License-Identifier: GPL-2.0-only
/*
 * A disk whose hardware is told of requests and never says that one is done: what becomes of those who wait for a block
 * when the driver is quarantined. Faults in a block driver's operations are in crash_block.c.
 */
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/module.h>
#include <linux/pci.h>
#include <linux/version.h>

#include "crash.h"

struct ring {
	int length;
	struct request **slots;         /* never allocated: the mistake */
};

static struct blk_mq_tag_set tags;
static struct gendisk *disk;
static struct pci_dev *card;            /* QEMU's edu, for one that may use the bus; or none */
static struct ring ring;
static int major;

static blk_status_t disk_queue_rq(struct blk_mq_hw_ctx *hctx, const struct blk_mq_queue_data *data)
{
	blk_mq_start_request(data->rq);
	return BLK_STS_OK;
}

static const struct blk_mq_ops request_operations = {
	.queue_rq = disk_queue_rq,
};

static const struct block_device_operations disk_operations = {
	.owner = THIS_MODULE,
};

static noinline void look_at(struct ring *r)
{
	if (r->slots[r->length]) /* CRASH: disk-dies */
		r->length++;
}

static ssize_t control_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (error)
		return error;
	/* Who is to wait for the disk says so before. */
	if (strncmp(name, "arm:", 4))
		look_at(&ring);
	return count;
}

static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	return crash_verdict(crash_context(), to, count, at);
}

CRASH_DEVICE(control, "crash_disk", control_read, control_write);

static int __init disk_init(void)
{
	int error;

	major = register_blkdev(0, "crash_disk");
	if (major < 0)
		return major;
	tags.ops = &request_operations;
	tags.nr_hw_queues = 1;
	tags.queue_depth = 16;
	tags.numa_node = NUMA_NO_NODE;
	error = blk_mq_alloc_tag_set(&tags);
	if (error)
		goto unregister;
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
	disk = blk_mq_alloc_disk(&tags, NULL, NULL);
#else
	disk = blk_mq_alloc_disk(&tags, NULL);
#endif
	error = PTR_ERR_OR_ZERO(disk);
	if (error)
		goto free;
	disk->major = major;
	disk->minors = 1;
	disk->flags |= GENHD_FL_NO_PART;
	disk->fops = &disk_operations;
	strscpy(disk->disk_name, "silent", sizeof(disk->disk_name));
	set_capacity(disk, 2048);
	card = pci_get_device(0x1234, 0x11e8, NULL);
	if (card)
		pci_set_master(card);
	error = device_add_disk(card ? &card->dev : NULL, disk, NULL);
	if (!error)
		error = misc_register(&control);
	if (!error)
		return 0;
	pci_dev_put(card);
	put_disk(disk);
free:
	blk_mq_free_tag_set(&tags);
unregister:
	unregister_blkdev(major, "crash_disk");
	return error;
}

static void __exit disk_exit(void)
{
	misc_deregister(&control);
	del_gendisk(disk);
	pci_dev_put(card);
	put_disk(disk);
	blk_mq_free_tag_set(&tags);
	unregister_blkdev(major, "crash_disk");
}

module_init(disk_init);
module_exit(disk_exit);
MODULE_DESCRIPTION("Crash corpus: a disk with requests under way when its driver is quarantined");
MODULE_LICENSE("GPL");
