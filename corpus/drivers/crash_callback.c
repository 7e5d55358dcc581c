// SPDX-License-Identifier: GPL-2.0-only
/*
 * Callbacks that the core kernel calls under its own locks: an attribute in sysfs (the file's mutex and
 * an active reference) and a network device notifier (the RTNL). The core's locks are the core's: after
 * an error return it releases them itself, and releasing them twice would be a second crash.
 */
#include <linux/device.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/rtnetlink.h>

#include "crash.h"

struct route {
	unsigned int level;
};

static struct route *route;             /* never set: the mistake */
static DEFINE_MUTEX(route_lock);
static char armed[CRASH_NAME_MAX];

static bool due(const char *name)
{
	if (strcmp(armed, name))
		return false;
	armed[0] = 0;
	return true;
}

static ssize_t level_store(struct device *device, struct device_attribute *attribute, const char *text,
			   size_t count)
{
	unsigned int level;
	int error = kstrtouint(text, 0, &level);

	if (error)
		return error;
	mutex_lock(&route_lock);
	if (due("sysfs"))
		WRITE_ONCE(route->level, level); /* CRASH: sysfs */
	mutex_unlock(&route_lock);
	return count;
}

static DEVICE_ATTR_WO(level);

static struct attribute *route_attrs[] = {
	&dev_attr_level.attr,
	NULL,
};
ATTRIBUTE_GROUPS(route);

static int route_event(struct notifier_block *block, unsigned long event, void *data)
{
	if (event == NETDEV_CHANGEMTU && due("netdev"))
		return READ_ONCE(route->level) ? NOTIFY_OK : NOTIFY_DONE; /* CRASH: netdev */
	return NOTIFY_DONE;
}

static struct notifier_block route_notifier = {
	.notifier_call = route_event,
};

static ssize_t route_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	char name[CRASH_NAME_MAX];
	int error = crash_name(name, from, count);

	if (error)
		return error;
	if (strncmp(name, "arm:", 4))
		return -EINVAL;
	strscpy(armed, name + 4, sizeof(armed));
	return count;
}

static ssize_t route_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = crash_context();

	if (!wrong && !crash_trylock(mutex_trylock(&route_lock)))
		wrong = "mutex";
	else if (!wrong)
		mutex_unlock(&route_lock);
	if (!wrong && !crash_trylock(rtnl_trylock()))
		wrong = "rtnl";
	else if (!wrong)
		rtnl_unlock();
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations route_operations = {
	.owner = THIS_MODULE,
	.read = route_read,
	.write = route_write,
};

static struct miscdevice route_device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_callback",
	.fops = &route_operations,
	.groups = route_groups,
	.mode = 0666,
};

static int __init route_init(void)
{
	int error = misc_register(&route_device);

	if (error)
		return error;
	error = register_netdevice_notifier(&route_notifier);
	if (error)
		misc_deregister(&route_device);
	return error;
}

static void __exit route_exit(void)
{
	unregister_netdevice_notifier(&route_notifier);
	misc_deregister(&route_device);
}

module_init(route_init);
module_exit(route_exit);
MODULE_DESCRIPTION("Crash corpus: faults in callbacks under the core's locks");
MODULE_LICENSE("GPL");
