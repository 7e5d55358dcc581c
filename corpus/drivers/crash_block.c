// SPDX-License-Identifier: GPL-2.0-only
/*
 * Two disks in memory: one takes requests (blk-mq), one takes bios. Their operations fault. A file system's
 * faults are in crash_fs.c.
 */
#include <linux/blk-mq.h>
#include <linux/blkdev.h>
#include <linux/highmem.h>
#include <linux/module.h>
#include <linux/version.h>
#include <linux/vmalloc.h>

#include "crash_arm.h"

#define DISK_BYTES (1 << 20)

struct disk {
	struct gendisk *disk;
	struct blk_mq_tag_set tags;
	spinlock_t lock;
	u8 *memory;
};

static struct disk by_request, by_bio;
static int major;

static void copy_segment(struct disk *d, struct bio_vec *bvec, loff_t at, bool to_disk)
{
	if (at + bvec->bv_len > DISK_BYTES)
		return;
	if (to_disk)
		memcpy_from_bvec(d->memory + at, bvec);
	else
		memcpy_to_bvec(bvec, d->memory + at);
}

static blk_status_t disk_queue_rq(struct blk_mq_hw_ctx *hctx, const struct blk_mq_queue_data *data)
{
	struct request *rq = data->rq;
	struct disk *d = &by_request;
	loff_t at = blk_rq_pos(rq) << SECTOR_SHIFT;
	struct req_iterator iterator;
	struct bio_vec bvec;

	if (due("queue-rq"))
		return READ_ONCE(settings->each[0]); /* CRASH: queue-rq */
	blk_mq_start_request(rq);
	if (due("queue-rq-started"))
		return READ_ONCE(settings->each[1]); /* CRASH: queue-rq-started */
	spin_lock(&d->lock);
	if (due("queue-rq-spinlock"))
		WRITE_ONCE(settings->each[2], 1); /* CRASH: queue-rq-spinlock */
	rq_for_each_segment(bvec, rq, iterator) {
		copy_segment(d, &bvec, at, rq_data_dir(rq) == WRITE);
		at += bvec.bv_len;
	}
	spin_unlock(&d->lock);
	blk_mq_end_request(rq, BLK_STS_OK);
	return BLK_STS_OK;
}

static const struct blk_mq_ops request_operations = {
	.queue_rq = disk_queue_rq,
};

/* Since v6.5 a disk, not one of its openings, is handed over. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 5, 0)
static int disk_open(struct gendisk *disk, blk_mode_t mode)
#else
static int disk_open(struct block_device *disk, fmode_t mode)
#endif
{
	if (due("disk-open"))
		return READ_ONCE(settings->level); /* CRASH: disk-open */
	return 0;
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 5, 0)
static void disk_release(struct gendisk *disk)
#else
static void disk_release(struct gendisk *disk, fmode_t mode)
#endif
{
	if (due("disk-release"))
		WRITE_ONCE(settings->level, 1); /* CRASH: disk-release */
}

#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 5, 0)
static int disk_ioctl(struct block_device *device, blk_mode_t mode, unsigned int command,
		      unsigned long argument)
#else
static int disk_ioctl(struct block_device *device, fmode_t mode, unsigned int command,
		      unsigned long argument)
#endif
{
	if (due("disk-ioctl"))
		return READ_ONCE(settings->level); /* CRASH: disk-ioctl */
	return -ENOTTY;
}

static const struct block_device_operations by_request_operations = {
	.owner = THIS_MODULE,
	.open = disk_open,
	.release = disk_release,
	.ioctl = disk_ioctl,
};

static void disk_submit_bio(struct bio *bio)
{
	loff_t at = bio->bi_iter.bi_sector << SECTOR_SHIFT;
	struct bvec_iter iterator;
	struct bio_vec bvec;

	if (due("submit-bio"))
		WRITE_ONCE(settings->each[0], 1); /* CRASH: submit-bio */
	bio_for_each_segment(bvec, bio, iterator) {
		copy_segment(&by_bio, &bvec, at, op_is_write(bio_op(bio)));
		at += bvec.bv_len;
	}
	bio_endio(bio);
}

static const struct block_device_operations by_bio_operations = {
	.owner = THIS_MODULE,
	.submit_bio = disk_submit_bio,
};

static struct gendisk *disk_allocate(bool requests)
{
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
	if (requests)
		return blk_mq_alloc_disk(&by_request.tags, NULL, &by_request);
	return blk_alloc_disk(NULL, NUMA_NO_NODE);
#else
	if (requests)
		return blk_mq_alloc_disk(&by_request.tags, &by_request);
	return blk_alloc_disk(NUMA_NO_NODE);
#endif
}

static void disk_remove(struct disk *d)
{
	if (d->disk) {
		del_gendisk(d->disk);
		put_disk(d->disk);
	}
	d->disk = NULL;
	if (d->tags.ops)
		blk_mq_free_tag_set(&d->tags);
	vfree(d->memory);
}

static int disk_add(struct disk *d, const char *name, const struct block_device_operations *operations,
		    int minor)
{
	struct gendisk *disk;
	int error;

	spin_lock_init(&d->lock);
	d->memory = vzalloc(DISK_BYTES);
	if (!d->memory)
		return -ENOMEM;
	disk = disk_allocate(d == &by_request);
	if (IS_ERR_OR_NULL(disk))
		return -ENOMEM;
	disk->major = major;
	disk->first_minor = minor;
	disk->minors = 1;
	disk->flags |= GENHD_FL_NO_PART;
	disk->fops = operations;
	disk->private_data = d;
	strscpy(disk->disk_name, name, sizeof(disk->disk_name));
	set_capacity(disk, DISK_BYTES >> SECTOR_SHIFT);
	error = add_disk(disk);
	if (error)
		put_disk(disk);
	else
		d->disk = disk;
	return error;
}

/* Both disks' locks must be free, and nothing may be on its way any more. */
static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = crash_context();

	if (!wrong && !crash_trylock(spin_trylock(&by_request.lock)))
		wrong = "spinlock";
	else if (!wrong)
		spin_unlock(&by_request.lock);
	if (!wrong) {
		/* Waits for every request. */
		blk_mq_freeze_queue(by_request.disk->queue);
		blk_mq_unfreeze_queue(by_request.disk->queue);
	}
	return crash_verdict(crash_unarmed(wrong), to, count, at);
}

CRASH_DEVICE(control, "crash_block", control_read, crash_arm_write);

static int __init disks_init(void)
{
	int error;

	major = register_blkdev(0, "crash_block");
	if (major < 0)
		return major;
	by_request.tags.ops = &request_operations;
	by_request.tags.nr_hw_queues = 1;
	by_request.tags.queue_depth = 16;
	by_request.tags.numa_node = NUMA_NO_NODE;
	error = blk_mq_alloc_tag_set(&by_request.tags);
	if (error) {
		by_request.tags.ops = NULL;
		goto out;
	}
	error = disk_add(&by_request, "crash_disk", &by_request_operations, 0);
	if (!error)
		error = disk_add(&by_bio, "crash_bios", &by_bio_operations, 1);
	if (!error)
		error = misc_register(&control);
	if (!error)
		return 0;
out:
	disk_remove(&by_bio);
	disk_remove(&by_request);
	unregister_blkdev(major, "crash_block");
	return error;
}

static void __exit disks_exit(void)
{
	misc_deregister(&control);
	disk_remove(&by_bio);
	disk_remove(&by_request);
	unregister_blkdev(major, "crash_block");
}

module_init(disks_init);
module_exit(disks_exit);
MODULE_DESCRIPTION("Crash corpus: faults in block drivers");
MODULE_LICENSE("GPL");
