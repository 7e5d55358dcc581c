//! Frames of those who did not crash: names, lines and variables, without registers.

use guest::GuestVirt;
use repair_image::{SourceFrame, base_name};
use serde::Serialize;

use super::Value;
use super::locals::Locals;
use crate::{Frame, Trust, UnwindEnd};

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Guest-virtual address that it executes at or returns to.
    pub pc: GuestVirt,
    /// Function without compiler suffixes, `None` when the address is in no known function.
    pub function: Option<String>,
    /// Bytes from that function's start.
    pub offset: Option<u64>,
    /// Module, `None` for the kernel proper.
    pub module: Option<String>,
    /// How it was found.
    pub trust: Trust,
    /// Inline chain with file and line, innermost first; empty when not known.
    pub source: Vec<SourceFrame>,
    /// Its variables, innermost scope first; empty where no debug information is at hand.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub variables: Vec<Value>,
}

/// Frames, innermost first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Backtrace {
    /// The frames.
    pub frames: Vec<Place>,
    /// Why there are no more.
    pub end: UnwindEnd,
}

impl Backtrace {
    pub(super) fn new(frames: &[Frame], end: UnwindEnd, locals: &Locals<'_>) -> Self {
        let mut trace = Self { frames: frames.iter().map(Place::of).collect(), end };
        for (place, variables) in trace.frames.iter_mut().zip(locals.of_stack(frames)) {
            place.variables = variables;
        }
        trace
    }
}

impl Place {
    fn of(frame: &Frame) -> Self {
        let pc = frame.pc.ip();
        Self {
            pc,
            function: frame.function.as_deref().map(|name| base_name(name).to_owned()),
            offset: frame.function_start.map(|start| pc - start),
            module: frame.module.clone(),
            trust: frame.trust,
            source: frame.source.clone(),
            variables: Vec::new(),
        }
    }
}
