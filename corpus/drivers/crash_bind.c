// SPDX-License-Identifier: GPL-2.0-only
/*
 * A platform device and its driver: binding and unbinding fault, attributes of driver and bus, what is
 * given back by itself. Run by the driver core under the device's lock.
 */
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/platform_device.h>
#include <linux/version.h>

#include "crash_arm.h"

static void on_release(void *data)
{
	if (due("devm-action"))
		WRITE_ONCE(settings->each[0], 0); /* CRASH: devm-action */
}

static int sensor_probe(struct platform_device *device)
{
	if (due("probe"))
		return READ_ONCE(settings->level); /* CRASH: probe */
	return devm_add_action(&device->dev, on_release, NULL);
}

static void forget(void)
{
	if (due("remove"))
		WRITE_ONCE(settings->level, 0); /* CRASH: remove */
}

/* It returned an error, which was ignored, before v6.11. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 11, 0)
static void sensor_remove(struct platform_device *device)
{
	forget();
}
#else
static int sensor_remove(struct platform_device *device)
{
	forget();
	return 0;
}
#endif

static ssize_t rate_store(struct device_driver *driver, const char *text, size_t count)
{
	if (due("driver-store"))
		return READ_ONCE(settings->limit); /* CRASH: driver-store */
	return count;
}

static ssize_t rate_show(struct device_driver *driver, char *text)
{
	if (due("driver-show"))
		return READ_ONCE(settings->limit); /* CRASH: driver-show */
	return sysfs_emit(text, "1\n");
}

static DRIVER_ATTR_RW(rate);

static struct attribute *sensor_attrs[] = {
	&driver_attr_rate.attr,
	NULL,
};
ATTRIBUTE_GROUPS(sensor);

static struct platform_driver sensor_driver = {
	.probe = sensor_probe,
	.remove = sensor_remove,
	.driver = {
		.name = "crash_bind",
		.groups = sensor_groups,
	},
};

static struct platform_device *sensor;

static ssize_t control_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	int error = crash_arm(from, count);

	return error ? error : count;
}

static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = crash_context();

	if (!wrong && !crash_trylock(device_trylock(&sensor->dev)))
		wrong = "device-lock";
	else if (!wrong)
		device_unlock(&sensor->dev);
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations control_operations = {
	.owner = THIS_MODULE,
	.read = control_read,
	.write = control_write,
};

static struct miscdevice control = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_bind",
	.fops = &control_operations,
	.mode = 0666,
};

static int __init bind_init(void)
{
	int error;

	sensor = platform_device_register_simple("crash_bind", 0, NULL, 0);
	if (IS_ERR(sensor))
		return PTR_ERR(sensor);
	error = platform_driver_register(&sensor_driver);
	if (!error)
		error = misc_register(&control);
	return error;
}

static void __exit bind_exit(void)
{
	misc_deregister(&control);
	platform_driver_unregister(&sensor_driver);
	platform_device_unregister(sensor);
}

module_init(bind_init);
module_exit(bind_exit);
MODULE_DESCRIPTION("Crash corpus: faults while a driver is bound to its device");
MODULE_LICENSE("GPL");
