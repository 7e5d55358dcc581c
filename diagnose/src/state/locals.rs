//! What variables of a frame are in force and hold, read from files with debug information, if there are any. What
//! knowledge keeps of modules without them is in `variables.rs`; DWARF is `repair_image`'s.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use guest::{CodeAddress, GuestVirt, LinkAddr};
use repair_image::{
    Absent, Argument, DebugFile, DebugInfo, FrameState, FrameVariable, Held, InForce, ValueKind,
};

use super::Value;
use super::variables::Content;
use crate::Frame;
use crate::kernel::Kernel;

/// Frames of one stack that are looked at.
const FRAMES_MAX: usize = 64;
/// Variables of one frame at most.
const VARIABLES_MAX: usize = 96;
/// Variables of all frames but those of the crash together.
const OTHERS_MAX: usize = 20_000;
/// Units of the kernel's debug information that are read for stacks other than that of the crash: what is mapped of them
/// counts as memory of this process.
const UNITS_MAX: usize = 32;
/// Calls outward that are asked, for one variable, what they passed on.
const CALLS_MAX: usize = 16;
/// Bytes of a string that are shown.
const TEXT_MAX: usize = 64;

/// Files with debug information, opened when a frame asks for them.
pub trait DebugFiles {
    /// The kernel's.
    fn kernel(&self) -> Option<&DebugFile>;

    /// A module's, with its sections where the guest has them.
    fn module(&self, name: &str) -> Option<&DebugFile>;
}

/// Variables of frames.
pub(super) struct Locals<'a> {
    kernel: Kernel<'a>,
    files: Option<&'a dyn DebugFiles>,
    of_kernel: OnceCell<Option<Rc<DebugInfo<'a>>>>,
    of_modules: RefCell<HashMap<String, Option<Rc<DebugInfo<'a>>>>>,
    /// How many variables may still be told.
    left: Cell<usize>,
    /// Calls that have been asked for the variable that is looked at.
    asked: Cell<usize>,
}

/// A frame and those outward of it.
#[derive(Clone, Copy)]
struct Position<'f> {
    frames: &'f [Frame],
    index: usize,
}

/// What the debug information says of the place where a frame stands.
struct Found<'a> {
    info: Rc<DebugInfo<'a>>,
    in_force: Rc<InForce<'a>>,
    slide: u64,
}

impl<'a> Locals<'a> {
    pub(super) fn new(kernel: Kernel<'a>, files: Option<&'a dyn DebugFiles>) -> Self {
        Self {
            kernel,
            files,
            of_kernel: OnceCell::new(),
            of_modules: RefCell::default(),
            left: Cell::new(OTHERS_MAX),
            asked: Cell::new(0),
        }
    }

    /// Variables of a stack that did not crash, by frame.
    ///
    /// # Errors
    /// Why they are not told, if too many have been before.
    pub(super) fn of_stack(&self, frames: &[Frame]) -> Result<Vec<Vec<Value>>, String> {
        let units = self.of_kernel.get().and_then(|info| Some(info.as_ref()?.units_read()));
        if units.is_some_and(|units| units >= UNITS_MAX) || self.left.get() == 0 {
            return Err("left out, there are too many".to_owned());
        }
        let of_frame = |index| {
            let mut found = self.of_frame(frames, index).unwrap_or_default();
            found.truncate(self.left.get());
            self.left.set(self.left.get() - found.len());
            found
        };
        Ok((0..frames.len().min(FRAMES_MAX)).map(of_frame).collect())
    }

    /// Variables of one frame; `None` where no file tells of it.
    pub(super) fn of_frame(&self, frames: &[Frame], index: usize) -> Option<Vec<Value>> {
        let position = Position { frames, index };
        let found = self.found(frames.get(index)?)?;
        let variables = found.in_force.variables.iter().take(VARIABLES_MAX);
        Some(variables.map(|variable| self.value(&found, variable, position)).collect())
    }

    fn info(&self, frame: &Frame) -> Option<Rc<DebugInfo<'a>>> {
        let files = self.files?;
        let open = |file: &'a DebugFile| file.info().ok().map(Rc::new);
        let Some(module) = self.kernel.image.module_of_text(frame.pc.lookup()) else {
            return self.of_kernel.get_or_init(|| files.kernel().and_then(open)).clone();
        };
        let mut opened = self.of_modules.borrow_mut();
        if let Some(known) = opened.get(&module.name) {
            return known.clone();
        }
        let info = files.module(&module.name).and_then(open);
        opened.insert(module.name.clone(), info.clone());
        info
    }

    fn found(&self, frame: &Frame) -> Option<Found<'a>> {
        let info = self.info(frame)?;
        let at = frame.pc.lookup();
        let slide = self.slide(at);
        let in_force = info.at(LinkAddr(at.0.wrapping_sub(slide)))?;
        Some(Found { info, in_force, slide })
    }

    /// Modules are described at the addresses where they lie.
    fn slide(&self, at: GuestVirt) -> u64 {
        let image = self.kernel.image;
        image.module_of_text(at).map_or(image.placement.slide, |_| 0)
    }

    fn value(
        &self,
        found: &Found<'a>,
        variable: &FrameVariable<'a>,
        position: Position<'_>,
    ) -> Value {
        self.asked.set(0);
        let passed = |argument: Argument<'_>| self.passed(position, argument);
        let held = match position.frames.get(position.index) {
            Some(frame) => {
                let state = self.state(frame, found.slide, &passed);
                found.info.held(&found.in_force, variable, &state)
            }
            None => Err(Absent::NotFollowed),
        };
        let content = held.as_ref().ok().and_then(|held| content(found, variable, held));
        Value {
            name: variable.name.to_owned(),
            of: variable.value_type.name.clone(),
            inlined: variable.inlined.map(str::to_owned),
            at: held.as_ref().ok().and_then(|held| held.at),
            text: content.as_ref().and_then(|content| self.text(variable, content)),
            value: content,
            absent: held.err(),
        }
    }

    fn state<'s>(
        &'s self,
        frame: &'s Frame,
        slide: u64,
        passed: &'s dyn Fn(Argument<'_>) -> Option<u64>,
    ) -> FrameState<'s> {
        let memory = self.kernel.memory;
        FrameState { registers: &frame.registers, cfa: frame.cfa, memory, slide, passed }
    }

    /// What the frame's function was called with, if it is certain who called it.
    fn passed(&self, position: Position<'_>, argument: Argument<'_>) -> Option<u64> {
        let Position { frames, index } = position;
        // An expression may ask often, and each answer may ask again.
        if self.asked.replace(self.asked.get() + 1) >= CALLS_MAX {
            return None;
        }
        let callee = self.found(frames.get(index)?)?.in_force;
        // It may have jumped into others, and they back into it.
        let name = callee.function.filter(|_| !callee.jumps_on)?;
        let caller = frames.get(index + 1)?;
        let CodeAddress::Return(to) = caller.pc else { return None };
        let found = self.found(caller)?;
        let outer = Position { frames, index: index + 1 };
        let passed = |argument: Argument<'_>| self.passed(outer, argument);
        let state = self.state(caller, found.slide, &passed);
        let to = LinkAddr(to.0.wrapping_sub(found.slide));
        found.info.passed(to, name, argument, &state)
    }

    /// The string that a pointer leads to, where that is plain text.
    fn text(&self, variable: &FrameVariable<'a>, content: &Content) -> Option<String> {
        let Content::Address(at) = content else { return None };
        if variable.value_type.kind != ValueKind::Text || !at.is_kernel_half() {
            return None;
        }
        let text = self.kernel.memory.read_cstr(*at, TEXT_MAX).ok()?;
        let plain = |byte: u8| byte == b' ' || byte.is_ascii_graphic();
        (!text.is_empty() && text.bytes().all(plain)).then_some(text)
    }
}

/// The value as its type has it; `None` for what has none.
fn content<'a>(found: &Found<'a>, variable: &FrameVariable<'a>, held: &Held) -> Option<Content> {
    if !held.parts.is_empty() {
        return Some(Content::Parts(held.parts.clone()));
    }
    let bits = held.bits?;
    let signed = || signed(bits, variable.value_type.size);
    Some(match variable.value_type.kind {
        ValueKind::Pointer | ValueKind::Text => Content::Address(GuestVirt(bits)),
        ValueKind::Bool if bits <= 1 => Content::Bool(bits == 1),
        ValueKind::Signed => Content::Signed(signed()),
        ValueKind::Enumeration => {
            let name = found.info.enumerator(&found.in_force, variable, signed());
            name.map_or(Content::Signed(signed()), |name| Content::Name(name.to_owned()))
        }
        ValueKind::Whole => return None,
        _ => Content::Unsigned(bits),
    })
}

/// The lowest `size` bytes as a signed number.
fn signed(bits: u64, size: u64) -> i64 {
    match size {
        1 => i64::from(bits as u8 as i8),
        2 => i64::from(bits as u16 as i16),
        4 => i64::from(bits as u32 as i32),
        _ => bits as i64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_sign_of_their_type() {
        assert_eq!(signed(0xffff_fff2, 4), -14);
        assert_eq!(signed(0xff, 1), -1);
        assert_eq!(signed(0xffff_fff2, 8), 0xffff_fff2);
        assert_eq!(signed(u64::MAX - 8, 8), -9);
    }
}
