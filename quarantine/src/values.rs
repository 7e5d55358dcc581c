//! Which value tells a caller "this failed" (or "I did nothing"), by type: for returning out of a
//! driver and for functions made to fail. One documented table; a type not in it is refused.

use std::fmt;

use repair_image::{Prototype, TypeShape, Types};
use serde::Serialize;

use crate::Reason;
use crate::boundaries::{Fixed, Rule};
use crate::contracts;

/// `EIO`, include/uapi/asm-generic/errno-base.h.
const EIO: i64 = 5;
/// `ENODEV`, include/uapi/asm-generic/errno-base.h.
const ENODEV: i64 = 19;
/// `EPOLLERR | EPOLLHUP`, include/uapi/linux/eventpoll.h (macros, so no type information has them).
const POLL_ERROR: i64 = 0x8 | 0x10;
/// `BLK_STS_IOERR`, include/linux/blk_types.h (a macro).
const BLK_STS_IOERR: i64 = 10;

/// A value to return.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Value {
    /// Number for rax, sign-extended; `None` for a function that returns nothing.
    pub number: Option<i64>,
    /// The value as a kernel developer writes it.
    pub name: String,
    /// Why this value.
    pub why: String,
}

impl Value {
    fn new(number: i64, name: &str, why: &str) -> Self {
        Self { number: Some(number), name: name.to_owned(), why: why.to_owned() }
    }

    fn error_pointer(why: &str) -> Self {
        Self::new(-EIO, "ERR_PTR(-EIO)", why)
    }

    pub(crate) fn nothing(why: &str) -> Self {
        Self { number: None, name: "nothing".to_owned(), why: why.to_owned() }
    }
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "return {}", self.name)
    }
}

/// What an entry point is made to fail as, once its driver is quarantined.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Brings a device into use: open, probe. Fails with `-ENODEV`.
    Open,
    /// Gives it back: release, remove, stop. Must look successful, or the caller would try again.
    Release,
    /// Walks a sequence: `struct seq_operations`. Its start is its end from now on.
    Sequence,
    /// Anything else.
    Work,
}

/// The value that hands an error to `caller`, which called `entry`, a function of this type.
pub(crate) fn error_for_caller(
    prototype: Option<&Prototype>,
    caller: &str,
    entry: &str,
    rule: Option<&Rule>,
    types: &dyn Types,
) -> Result<Value, Reason> {
    if let Some(Fixed::Never(why)) = rule.and_then(|rule| rule.fixed) {
        let function = caller.to_owned();
        return Err(Reason::NotReturnable { function, why: why.to_owned() });
    }
    let returns = prototype.map(|prototype| &prototype.returns);
    if returns == Some(&TypeShape::Void) {
        return Ok(Value::nothing("the function returns nothing"));
    }
    let checks_pointers = rule.is_some_and(|rule| rule.fixed == Some(Fixed::ErrorPointer));
    match rule.and_then(|rule| rule.fixed) {
        Some(Fixed::Nothing) => {
            return Ok(Value::nothing("the caller expects nothing"));
        }
        Some(Fixed::Number(number, name, why)) => return Ok(Value::new(number, name, why)),
        Some(Fixed::Enumerator(name, why)) => return enumerator(types, name, why),
        Some(Fixed::ErrorPointer | Fixed::Never(_)) | None => {}
    }
    let member = rule
        .and_then(|rule| rule.members.iter().find_map(|m| types.member_prototype(m.0, m.1)))
        .map(|prototype| prototype.returns);
    let shape = returns.or(member.as_ref()).ok_or_else(|| Reason::UnknownReturnType {
        function: caller.to_owned(),
        entry: entry.to_owned(),
    })?;
    if let TypeShape::Pointer { .. } = shape
        && checks_pointers
    {
        return Ok(Value::error_pointer("the caller checks the pointer with IS_ERR()"));
    }
    // Which caller it is, inlining may have hidden; what operation was called, its type may tell.
    by_type(shape, types, Role::Work, caller).or_else(|refused| {
        let contract = prototype.and_then(|prototype| contracts::of(prototype, types));
        contract.map_or(Err(refused), |fixed| of_contract(fixed, entry, types))
    })
}

/// The value that an entry point of a quarantined driver returns from now on.
pub(crate) fn stub_value(
    prototype: &Prototype,
    function: &str,
    role: Role,
    types: &dyn Types,
) -> Result<Value, Reason> {
    if let Some(fixed) = contracts::of(prototype, types) {
        return of_contract(fixed, function, types);
    }
    let returns = &prototype.returns;
    match (returns, role) {
        (TypeShape::Enum { tag, .. }, _) if tag == "irqreturn" => enumerator(
            types,
            "IRQ_NONE",
            "the device is no longer served: others on the line are asked, and the kernel switches a \
             screaming line off",
        ),
        (TypeShape::Pointer { .. }, Role::Sequence) => {
            Ok(Value::new(0, "NULL", "the sequence is at its end"))
        }
        (TypeShape::Int { signed: true, size: 4 | 8, .. }, Role::Release) => {
            Ok(Value::new(0, "0", "giving back must look successful"))
        }
        (TypeShape::Int { name, signed: true, size: 4 | 8 }, Role::Open) if name != "ssize_t" => {
            Ok(Value::new(-ENODEV, "-ENODEV", "the device is no longer there"))
        }
        _ => by_type(returns, types, role, function),
    }
}

fn of_contract(fixed: Fixed, function: &str, types: &dyn Types) -> Result<Value, Reason> {
    match fixed {
        Fixed::Nothing => Ok(Value::nothing("its callers expect nothing")),
        Fixed::Number(number, name, why) => Ok(Value::new(number, name, why)),
        Fixed::Enumerator(name, why) => enumerator(types, name, why),
        Fixed::ErrorPointer => {
            Ok(Value::error_pointer("its callers check the pointer with IS_ERR()"))
        }
        Fixed::Never(why) => {
            Err(Reason::Unpatchable { function: function.to_owned(), why: why.to_owned() })
        }
    }
}

fn by_type(
    shape: &TypeShape,
    types: &dyn Types,
    role: Role,
    function: &str,
) -> Result<Value, Reason> {
    let refused = || Reason::NoErrorValue { shape: describe(shape), function: function.to_owned() };
    match shape {
        TypeShape::Void => Ok(Value::nothing("the function returns nothing")),
        TypeShape::Bool => Ok(Value::new(0, "false", "nothing was done")),
        TypeShape::Int { name, .. } if name == "__poll_t" => {
            Ok(Value::new(POLL_ERROR, "EPOLLERR | EPOLLHUP", "poll() reports an error"))
        }
        TypeShape::Int { name, .. } if name == "vm_fault_t" => {
            enumerator(types, "VM_FAULT_SIGBUS", "the access to the mapping fails with SIGBUS")
        }
        TypeShape::Int { name, .. } if name == "blk_status_t" => {
            Ok(Value::new(BLK_STS_IOERR, "BLK_STS_IOERR", "the request fails with an I/O error"))
        }
        // `ndo_fix_features`, `ndo_features_check`: what of these features can be used.
        TypeShape::Int { name, .. } if name == "netdev_features_t" => {
            Ok(Value::new(0, "no features", "the network core does by itself what is not offered"))
        }
        // `ndo_select_queue`; nothing else tells its type from any 16-bit number.
        TypeShape::Int { signed: false, size: 2, .. } if function.contains("select_queue") => {
            Ok(Value::new(0, "queue 0", "every network device has a first queue"))
        }
        TypeShape::Int { signed: true, size: 4 | 8, .. } => {
            let why = if role == Role::Open { "it cannot be opened" } else { "the call fails" };
            Ok(Value::new(-EIO, "-EIO", why))
        }
        TypeShape::Enum { tag, .. } => match tag.as_str() {
            "irqreturn" => enumerator(types, "IRQ_HANDLED", "the interrupt counts as served"),
            "hrtimer_restart" => enumerator(types, "HRTIMER_NORESTART", "the timer ends"),
            "netdev_tx" => enumerator(
                types,
                "NETDEV_TX_OK",
                "the packet is lost; NETDEV_TX_BUSY would send it again at once",
            ),
            "blk_eh_timer_return" => {
                enumerator(types, "BLK_EH_RESET_TIMER", "the request waits for as long again")
            }
            _ => Err(refused()),
        },
        _ => Err(refused()),
    }
}

fn enumerator(types: &dyn Types, name: &str, why: &str) -> Result<Value, Reason> {
    let number = types.enumerator(name).ok_or_else(|| Reason::NoErrorValue {
        shape: format!("the enumeration of {name}"),
        function: "this kernel".to_owned(),
    })?;
    Ok(Value::new(number, name, why))
}

/// The type in C, as far as it matters.
pub(crate) fn describe(shape: &TypeShape) -> String {
    match shape {
        TypeShape::Void => "void".to_owned(),
        TypeShape::Bool => "bool".to_owned(),
        TypeShape::Int { name, .. } | TypeShape::Aggregate { name, .. } => name.clone(),
        TypeShape::Enum { tag, .. } => format!("enum {tag}"),
        TypeShape::Pointer { to: Some(to) } => format!("{to} *"),
        TypeShape::Pointer { to: None } => "pointer".to_owned(),
        _ => "an unusual type".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boundaries::rule;
    use crate::testing::{FakeTypes, int, prototype, tagged};

    fn value(returns: Option<TypeShape>, caller: &str) -> Result<Option<i64>, Reason> {
        let types = FakeTypes::linux();
        let prototype = returns.map(prototype);
        error_for_caller(prototype.as_ref(), caller, "f", rule(caller), &types).map(|v| v.number)
    }

    #[test]
    fn the_table_of_returned_errors() {
        assert_eq!(value(Some(int("ssize_t", 8, true)), "vfs_write"), Ok(Some(-5)));
        assert_eq!(value(Some(int("int", 4, true)), "do_dentry_open"), Ok(Some(-5)));
        assert_eq!(value(Some(TypeShape::Void), "somewhere"), Ok(None));
        assert_eq!(value(Some(TypeShape::Bool), "somewhere"), Ok(Some(0)));
        assert_eq!(value(Some(int("__poll_t", 4, false)), "do_sys_poll"), Ok(Some(0x18)));
        assert_eq!(value(Some(int("vm_fault_t", 4, false)), "__do_fault"), Ok(Some(2)));
        assert_eq!(
            value(Some(int("blk_status_t", 1, false)), "blk_mq_dispatch_rq_list"),
            Ok(Some(10))
        );
        assert_eq!(value(Some(tagged("netdev_tx")), "dev_hard_start_xmit"), Ok(Some(0)));
        assert_eq!(value(None, "__handle_irq_event_percpu"), Ok(Some(1)));
        assert_eq!(value(None, "__hrtimer_run_queues"), Ok(Some(0)));
        assert_eq!(value(None, "call_timer_fn"), Ok(None));
        assert_eq!(value(None, "kthread"), Ok(Some(-5)));
        assert_eq!(value(Some(int("int", 4, true)), "__napi_poll"), Ok(Some(64)));
        assert_eq!(value(Some(int("unsigned int", 4, false)), "nf_hook_slow"), Ok(Some(0)));
        assert_eq!(value(Some(int("int", 4, true)), "kprobe_ftrace_handler"), Ok(Some(0)));
        assert_eq!(value(Some(int("int", 4, true)), "notifier_call_chain"), Ok(Some(0)));
    }

    #[test]
    fn pointers_only_where_the_caller_checks_them() {
        let pointer = TypeShape::Pointer { to: None };
        assert_eq!(value(Some(pointer.clone()), "seq_read_iter"), Ok(Some(-5)));
        assert_eq!(value(Some(int("int", 4, true)), "seq_read_iter"), Ok(Some(-5)));
        assert!(matches!(value(Some(pointer), "vfs_write"), Err(Reason::NoErrorValue { .. })));
    }

    #[test]
    fn without_a_prototype_the_member_tells() {
        assert_eq!(value(None, "vfs_write"), Ok(Some(-5)));
        assert!(matches!(value(None, "anything"), Err(Reason::UnknownReturnType { .. })));
        assert!(matches!(value(None, "seq_read_iter"), Err(Reason::UnknownReturnType { .. })));
    }

    #[test]
    fn a_caller_that_would_do_harm_is_handed_nothing() {
        let refused = |returns, caller| {
            matches!(value(Some(returns), caller), Err(Reason::NotReturnable { .. }))
        };
        assert!(refused(int("int", 4, true), "do_one_initcall"));
        assert!(refused(TypeShape::Void, "__do_sys_delete_module"));
        assert!(refused(TypeShape::Void, "__submit_bio"));
    }

    #[test]
    fn unsigned_numbers_are_refused() {
        let shape = int("unsigned long", 8, false);
        assert!(matches!(value(Some(shape), "anything"), Err(Reason::NoErrorValue { .. })));
    }

    #[test]
    fn a_network_device_offers_nothing_and_sends_by_its_first_queue() {
        let types = FakeTypes::linux();
        let stub = |shape: &TypeShape, name| {
            stub_value(&prototype(shape.clone()), name, Role::Work, &types)
        };
        let features = stub(&int("netdev_features_t", 8, false), "tun_net_fix_features");
        assert_eq!(features.unwrap().number, Some(0));
        let queue = int("u16", 2, false);
        assert_eq!(stub(&queue, "tun_select_queue").unwrap().number, Some(0));
        assert!(matches!(stub(&queue, "tun_checksum"), Err(Reason::NoErrorValue { .. })));
    }

    #[test]
    fn the_table_of_operations_tells_what_a_type_does_not() {
        let shape = TypeShape::Pointer { to: Some("dentry".to_owned()) };
        let (lookup, command) = (prototype(shape), prototype(int("int", 4, true)));
        let types = FakeTypes::linux()
            .with_prototype("inode_operations", "lookup", lookup.clone())
            .with_prototype("scsi_host_template", "queuecommand", command.clone());
        let found = stub_value(&lookup, "vfat_lookup", Role::Work, &types).unwrap();
        assert_eq!((found.number, found.name.as_str()), (Some(-5), "ERR_PTR(-EIO)"));
        // A caller into which those were inlined that the operation is called by.
        let returned = error_for_caller(Some(&lookup), "path_openat", "f", None, &types).unwrap();
        assert_eq!(returned.number, Some(-5));
        let returned = error_for_caller(Some(&command), "scsi_queue_rq", "f", None, &types);
        assert_eq!(returned.unwrap().name, "-EIO", "what a type tells holds for the caller");
        let refused = stub_value(&command, "f", Role::Work, &types);
        assert!(matches!(refused, Err(Reason::Unpatchable { .. })));
    }

    #[test]
    fn stubs_differ_by_role() {
        let types = FakeTypes::linux();
        let stub = |shape: &TypeShape, role| {
            stub_value(&prototype(shape.clone()), "f", role, &types).unwrap().number
        };
        assert_eq!(stub(&int("int", 4, true), Role::Open), Some(-19));
        assert_eq!(stub(&int("int", 4, true), Role::Release), Some(0));
        assert_eq!(stub(&int("ssize_t", 8, true), Role::Work), Some(-5));
        assert_eq!(stub(&tagged("irqreturn"), Role::Work), Some(0));
        assert_eq!(stub(&TypeShape::Void, Role::Release), None);
        let pointer = TypeShape::Pointer { to: None };
        assert_eq!(stub(&pointer, Role::Sequence), Some(0));
        assert!(stub_value(&prototype(pointer), "f", Role::Work, &types).is_err());
    }
}
