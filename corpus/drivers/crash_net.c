// SPDX-License-Identifier: GPL-2.0-only
/*
 * A network card that is not there: what it is sent comes back through NAPI. Its operations fault, and a
 * protocol handler, a filter hook, a packet's destructor. Notifiers are in crash_callback.c.
 */
#include <linux/etherdevice.h>
#include <linux/ip.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/netdevice.h>
#include <linux/netfilter.h>
#include <linux/netfilter_ipv4.h>
#include <linux/rtnetlink.h>
#include <linux/skbuff.h>
#include <net/net_namespace.h>

#include "crash_arm.h"

#define MISTAKE(n) WRITE_ONCE(settings->each[n], 1)

struct card {
	struct napi_struct napi;
	struct sk_buff_head ring;
};

static bool filter = true;
module_param(filter, bool, 0);
MODULE_PARM_DESC(filter, "look at packets that leave: in quarantine none of them would");

static struct net_device *device;

static int card_open(struct net_device *dev)
{
	struct card *c = netdev_priv(dev);

	if (due("ndo-open"))
		return READ_ONCE(settings->level); /* CRASH: ndo-open */
	napi_enable(&c->napi);
	netif_start_queue(dev);
	return 0;
}

static int card_stop(struct net_device *dev)
{
	struct card *c = netdev_priv(dev);

	netif_stop_queue(dev);
	napi_disable(&c->napi);
	if (due("ndo-stop"))
		return READ_ONCE(settings->level); /* CRASH: ndo-stop */
	return 0;
}

static void packet_gone(struct sk_buff *skb)
{
	if (due("skb-destructor"))
		MISTAKE(0); /* CRASH: skb-destructor */
}

static netdev_tx_t card_xmit(struct sk_buff *skb, struct net_device *dev)
{
	struct card *c = netdev_priv(dev);

	if (due("ndo-xmit"))
		MISTAKE(1); /* CRASH: ndo-xmit */
	/* Not once, but for good. */
	if (unlikely(!strcmp(crash_armed, "card-dies")))
		MISTAKE(3); /* CRASH: card-dies */
	skb_orphan(skb);
	skb->protocol = eth_type_trans(skb, dev);
	skb_queue_tail(&c->ring, skb);
	napi_schedule(&c->napi);
	return NETDEV_TX_OK;
}

static int card_poll(struct napi_struct *napi, int budget)
{
	struct card *c = container_of(napi, struct card, napi);
	struct sk_buff *skb;
	int n = 0;

	if (due("napi-poll"))
		return READ_ONCE(settings->level); /* CRASH: napi-poll */
	while (n < budget && (skb = skb_dequeue(&c->ring))) {
		skb->destructor = packet_gone;
		netif_receive_skb(skb);
		n++;
	}
	if (n < budget)
		napi_complete_done(napi, n);
	return n;
}

static void card_stats(struct net_device *dev, struct rtnl_link_stats64 *stats)
{
	if (due("ndo-stats"))
		stats->rx_packets = READ_ONCE(settings->limit); /* CRASH: ndo-stats */
}

static int card_mtu(struct net_device *dev, int mtu)
{
	if (due("ndo-mtu"))
		return READ_ONCE(settings->level); /* CRASH: ndo-mtu */
	dev->mtu = mtu;
	return 0;
}

static int card_address(struct net_device *dev, void *address)
{
	if (due("ndo-address"))
		return READ_ONCE(settings->level); /* CRASH: ndo-address */
	return eth_mac_addr(dev, address);
}

static void card_rx_mode(struct net_device *dev)
{
	if (due("ndo-rx-mode"))
		MISTAKE(2); /* CRASH: ndo-rx-mode */
}

static const struct net_device_ops card_operations = {
	.ndo_open = card_open,
	.ndo_stop = card_stop,
	.ndo_start_xmit = card_xmit,
	.ndo_get_stats64 = card_stats,
	.ndo_change_mtu = card_mtu,
	.ndo_set_mac_address = card_address,
	.ndo_set_rx_mode = card_rx_mode,
};

/* The local experimental ethertype, which the agent's packets carry. */
static int protocol_receive(struct sk_buff *skb, struct net_device *dev, struct packet_type *type,
			    struct net_device *original)
{
	if (due("packet-type"))
		return READ_ONCE(settings->level); /* CRASH: packet-type */
	kfree_skb(skb);
	return 0;
}

static struct packet_type protocol = {
	.type = cpu_to_be16(0x88b5),
	.func = protocol_receive,
};

static unsigned int on_output(void *data, struct sk_buff *skb, const struct nf_hook_state *state)
{
	/* Not the packets of others that are about their work. */
	if (ip_hdr(skb)->protocol == IPPROTO_UDP && due("netfilter"))
		return READ_ONCE(settings->level); /* CRASH: netfilter */
	return NF_ACCEPT;
}

static const struct nf_hook_ops output_hook = {
	.hook = on_output,
	.pf = NFPROTO_IPV4,
	.hooknum = NF_INET_LOCAL_OUT,
	.priority = NF_IP_PRI_FIRST,
};

static ssize_t control_write(struct file *file, const char __user *from, size_t count, loff_t *at)
{
	int error = crash_arm(from, count);

	return error ? error : count;
}

static ssize_t control_read(struct file *file, char __user *to, size_t count, loff_t *at)
{
	const char *wrong = crash_context();

	if (!wrong && !crash_trylock(rtnl_trylock()))
		wrong = "rtnl";
	else if (!wrong)
		rtnl_unlock();
	if (!wrong && !crash_trylock(!spin_is_locked(&netdev_get_tx_queue(device, 0)->_xmit_lock)))
		wrong = "tx-lock";
	if (!wrong && crash_armed[0])
		wrong = "did-not-fault";
	return crash_verdict(wrong, to, count, at);
}

static const struct file_operations control_operations = {
	.owner = THIS_MODULE,
	.read = control_read,
	.write = control_write,
};

static struct miscdevice control = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "crash_net",
	.fops = &control_operations,
	.mode = 0666,
};

static int __init card_init(void)
{
	struct card *c;
	int error;

	device = alloc_netdev(sizeof(*c), "crash0", NET_NAME_ENUM, ether_setup);
	if (!device)
		return -ENOMEM;
	c = netdev_priv(device);
	skb_queue_head_init(&c->ring);
	device->netdev_ops = &card_operations;
	device->flags |= IFF_NOARP;
	eth_hw_addr_random(device);
	netif_napi_add(device, &c->napi, card_poll);
	error = register_netdev(device);
	if (error)
		goto free;
	dev_add_pack(&protocol);
	error = filter ? nf_register_net_hook(&init_net, &output_hook) : 0;
	if (!error)
		error = misc_register(&control);
	if (!error)
		return 0;
	dev_remove_pack(&protocol);
	unregister_netdev(device);
free:
	free_netdev(device);
	return error;
}

static void __exit card_exit(void)
{
	misc_deregister(&control);
	if (filter)
		nf_unregister_net_hook(&init_net, &output_hook);
	dev_remove_pack(&protocol);
	unregister_netdev(device);
	free_netdev(device);
}

module_init(card_init);
module_exit(card_exit);
MODULE_DESCRIPTION("Crash corpus: faults in a network driver");
MODULE_LICENSE("GPL");
