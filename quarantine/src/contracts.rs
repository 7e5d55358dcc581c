//! What an operation of a driver's returns for "failed" or "nothing there" where the type of its value alone does not
//! tell: a table by the operation that has the same parameters, too. Values by type are in `values.rs`, callers in
//! `boundaries.rs`.

use repair_image::{Prototype, Types};

use crate::boundaries::Fixed;

const NONE: Fixed = Fixed::Number(0, "0", "there is none");
const NO_POINTER: Fixed = Fixed::Number(0, "NULL", "there is none");

const LOCKED: Fixed = Fixed::Never("the page stays locked, and who wants it waits without end");

/// Structure, function pointer in it, and what its callers take for "failed" or "nothing there".
type Contract = (&'static str, &'static str, Fixed);

/// Checked in Linux 6.1 and 6.12. Where two operations have one type, both stand here with one value; one that
/// would need another one bars the type.
const CONTRACTS: &[Contract] = &[
    // fs/namei.c: __lookup_slow(), lookup_open(); pick_link(); fs/posix_acl.c: __get_acl().
    ("inode_operations", "lookup", Fixed::ErrorPointer),
    ("inode_operations", "get_link", Fixed::ErrorPointer),
    ("inode_operations", "get_acl", Fixed::ErrorPointer),
    ("inode_operations", "get_inode_acl", Fixed::ErrorPointer),
    // fs/fs_context.c: legacy_get_tree().
    ("file_system_type", "mount", Fixed::ErrorPointer),
    // fs/exportfs/expfs.c: exportfs_decode_fh_raw(), reconnect_one().
    ("export_operations", "fh_to_dentry", Fixed::ErrorPointer),
    ("export_operations", "fh_to_parent", Fixed::ErrorPointer),
    ("export_operations", "get_parent", Fixed::ErrorPointer),
    // fs/inode.c: alloc_inode(), as without memory.
    ("super_operations", "alloc_inode", NO_POINTER),
    // fs/inode.c: bmap(): a hole.
    ("address_space_operations", "bmap", NONE),
    // mm/filemap.c: filemap_read_folio(), generic_perform_write(); mm/page-writeback.c: write_cache_pages(). They hand over a
    // page that is locked, which the file system unlocks, failed or not (Documentation/filesystems/locking.rst).
    ("address_space_operations", "read_folio", LOCKED),
    ("address_space_operations", "writepage", LOCKED),
    ("address_space_operations", "write_end", LOCKED),
    // fs/sysfs/group.c: create_files(): the attribute is not shown.
    ("attribute_group", "is_visible", NONE),
    ("attribute_group", "is_bin_visible", NONE),
    // drivers/hwmon/hwmon.c: hwmon_genattr().
    ("hwmon_ops", "is_visible", NONE),
    // drivers/base/core.c: device_get_devnode(): the device's own name.
    ("class", "devnode", NO_POINTER),
    ("device_type", "devnode", NO_POINTER),
    // mm/vmscan.c, mm/shrinker.c: do_shrink_slab(): nothing to be freed, nothing freed.
    ("shrinker", "count_objects", NONE),
    ("shrinker", "scan_objects", NONE),
    // net/ethtool: no link, no messages, no tables; all of one type.
    ("ethtool_ops", "get_link", NONE),
    ("ethtool_ops", "get_msglevel", NONE),
    ("ethtool_ops", "get_rxfh_indir_size", NONE),
    ("ethtool_ops", "get_rxfh_key_size", NONE),
    // net/netfilter/core.c: nf_hook_slow(). A filter that is gone must not let everything pass.
    (
        "nf_hook_ops",
        "hook",
        Fixed::Number(
            0,
            "NF_DROP",
            "the packet is dropped: a filter that is gone lets nothing pass",
        ),
    ),
    // net/core/rtnetlink.c: if_nlmsg_size().
    ("rtnl_link_ops", "get_size", NONE),
    // drivers/tty/tty_ioctl.c: tty_write_room(), tty_chars_in_buffer().
    ("tty_operations", "write_room", NONE),
    ("tty_operations", "chars_in_buffer", NONE),
    // drivers/pci/pcie/err.c: report_error_detected().
    (
        "pci_error_handlers",
        "error_detected",
        Fixed::Enumerator("PCI_ERS_RESULT_DISCONNECT", "the device is no longer driven"),
    ),
    // block/blk-core.c: __submit_bio(). What it is given must be ended, by bio_endio(), and a stub does not.
    (
        "block_device_operations",
        "submit_bio",
        Fixed::Never("I/O that is dropped is waited for without end"),
    ),
    // drivers/scsi/scsi_lib.c: scsi_dispatch_cmd() takes any error for a busy host.
    (
        "scsi_host_template",
        "queuecommand",
        Fixed::Never("a SCSI host that fails a command is asked again for ever"),
    ),
];

/// What a function of this type returns; `None` when the table does not tell, or tells different things.
pub(crate) fn of(prototype: &Prototype, types: &dyn Types) -> Option<Fixed> {
    let mut values = CONTRACTS
        .iter()
        .filter(|(structure, member, _)| {
            let contract = types.member_prototype(structure, member);
            contract.is_some_and(|contract| is_same(prototype, &contract))
        })
        .map(|contract| contract.2);
    let value = values.next()?;
    values.all(|other| other == value).then_some(value)
}

/// Whether both have the same types, whatever their parameters are called.
fn is_same(one: &Prototype, other: &Prototype) -> bool {
    let shapes = |prototype: &Prototype| -> Vec<_> {
        prototype.parameters.iter().map(|parameter| parameter.shape.clone()).collect()
    };
    one.returns == other.returns && shapes(one) == shapes(other)
}

#[cfg(test)]
mod tests {
    use repair_image::{Parameter, TypeShape};

    use super::*;
    use crate::testing::{FakeTypes, int};

    fn pointer(to: &str) -> TypeShape {
        TypeShape::Pointer { to: Some(to.to_owned()) }
    }

    fn function(returns: TypeShape, parameters: &[TypeShape]) -> Prototype {
        let parameters = parameters
            .iter()
            .map(|shape| Parameter { name: "own".to_owned(), shape: shape.clone() })
            .collect();
        Prototype { returns, parameters }
    }

    #[test]
    fn the_operation_of_the_same_type_tells() {
        let types = FakeTypes::linux()
            .with_prototype(
                "ethtool_ops",
                "get_link",
                function(int("u32", 4, false), &[pointer("d")]),
            )
            .with_prototype("inode_operations", "lookup", function(pointer("dentry"), &[]));
        let told = |returns, parameters: &[_]| of(&function(returns, parameters), &types);
        assert_eq!(told(int("u32", 4, false), &[pointer("d")]), Some(NONE));
        assert_eq!(told(int("u32", 4, false), &[pointer("e")]), None);
        assert_eq!(told(pointer("dentry"), &[]), Some(Fixed::ErrorPointer));
    }

    #[test]
    fn two_operations_of_one_type_must_agree() {
        let same = function(int("u32", 4, false), &[]);
        let types = FakeTypes::linux()
            .with_prototype("ethtool_ops", "get_link", same.clone())
            .with_prototype("scsi_host_template", "queuecommand", same.clone());
        assert_eq!(of(&same, &types), None);
    }
}
