//! The debug registers that hooks are made of where the CPU runs the guest, and who gives way when they are short.

use guest::{Hook, HookKind};

use crate::Error;

/// Address registers DR0 to DR3 (Intel SDM 3B 18.2.1).
pub(crate) const DEBUG_REGISTERS: usize = 4;

/// The hook that is to give way to a call's end, if debug registers are short. A stack overflow is reported by
/// `exc_double_fault()` before `handle_stack_overflow()` or, where that is called for a page fault, by the
/// `oops_begin()` it leads to (arch/x86/mm/fault.c, `page_fault_oops()`); and a call has a stack of its own.
///
/// # Errors
/// [`Error::NoDebugRegister`] when none can.
pub(crate) fn lend(hooks: &[Hook]) -> Result<Option<Hook>, Error> {
    if hooks.len() < DEBUG_REGISTERS {
        return Ok(None);
    }
    let lent = hooks.iter().find(|hook| hook.kind == HookKind::StackOverflow);
    lent.map(|hook| Some(*hook)).ok_or(Error::NoDebugRegister)
}
