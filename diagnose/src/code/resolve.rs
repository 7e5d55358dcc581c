//! What an abstract value is in one frame: from its registers, its stack slots, or by loading again.
//! Guest memory may be hostile: depth is bounded, unreadable means unknown.

use guest::{GuestVirt, Reg, Registers, VirtMemory};

use super::state::State;
use super::value::{Base, Node, Nodes, Value};

/// Most loads and masks that one value goes through.
const MAX_DEPTH: u32 = 8;

/// A frame to look values up in.
pub(crate) struct Place<'a> {
    pub(crate) memory: &'a dyn VirtMemory,
    pub(crate) nodes: &'a Nodes,
    pub(crate) state: &'a State,
    /// Registers in the frame.
    pub(crate) registers: &'a Registers,
    pub(crate) cfa: Option<GuestVirt>,
    /// Per-CPU base of the CPU that runs the frame.
    pub(crate) per_cpu: Option<u64>,
}

impl Place<'_> {
    /// The number behind a value.
    pub(crate) fn resolve(&self, value: Value) -> Option<u64> {
        self.resolve_to(value, MAX_DEPTH)
    }

    /// The number behind a value, only where a register or slot still holds it (nothing is loaded or
    /// computed again).
    pub(crate) fn remembered(&self, value: Value) -> Option<u64> {
        let base = match value.base {
            Base::Const => 0,
            Base::Cfa => self.cfa?.0,
            Base::Entry(_) => self.held(value.base, MAX_DEPTH)?,
            Base::Node(index) => match (self.held(value.base, MAX_DEPTH), self.nodes.get(index)) {
                (Some(found), _) => found,
                (None, Some(Node::Masked(of, mask))) if of.base != value.base => {
                    self.remembered_base(of)? & mask
                }
                _ => return None,
            },
        };
        Some(base.wrapping_add_signed(value.offset))
    }

    fn remembered_base(&self, value: Value) -> Option<u64> {
        Some(self.held(value.base, MAX_DEPTH)?.wrapping_add_signed(value.offset))
    }

    fn resolve_to(&self, value: Value, depth: u32) -> Option<u64> {
        if depth == 0 {
            return None;
        }
        let base = match value.base {
            Base::Const => 0,
            Base::Cfa => self.cfa?.0,
            Base::Entry(_) => self.held(value.base, depth)?,
            Base::Node(index) => match self.held(value.base, depth) {
                Some(found) => found,
                None => self.again(self.nodes.get(index)?, depth)?,
            },
        };
        Some(base.wrapping_add_signed(value.offset))
    }

    /// From a register or slot that still holds something at a fixed distance from it.
    fn held(&self, base: Base, depth: u32) -> Option<u64> {
        let in_register = Reg::GENERAL.into_iter().find_map(|reg| {
            let held = self.state.reg(reg);
            let known = self.registers.get(reg)?;
            (held.base == base).then(|| known.wrapping_add_signed(held.offset.wrapping_neg()))
        });
        let rsp = self.state.reg(Reg::Rsp);
        in_register.or_else(|| {
            self.state.slots.iter().find_map(|(at, held)| {
                let live = at.base != rsp.base || at.offset >= rsp.offset;
                if held.base != base || at.base == base || !live {
                    return None;
                }
                let at = self.resolve_to(*at, depth - 1)?;
                let word = self.memory.read_u64(GuestVirt(at)).ok()?;
                Some(word.wrapping_add_signed(held.offset.wrapping_neg()))
            })
        })
    }

    /// By computing it again: memory may have changed since.
    fn again(&self, node: Node, depth: u32) -> Option<u64> {
        match node {
            Node::Load(from, size) => {
                let from = self.resolve_to(from, depth - 1)?;
                self.memory.read_uint(GuestVirt(from), u64::from(size)).ok()
            }
            Node::PerCpu(offset, size) => {
                let at = self.per_cpu?.wrapping_add(offset);
                self.memory.read_uint(GuestVirt(at), u64::from(size)).ok()
            }
            Node::Masked(of, mask) => Some(self.resolve_to(of, depth - 1)? & mask),
            Node::Result(_) | Node::Flags | Node::Opaque => None,
        }
    }
}
