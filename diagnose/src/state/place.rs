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
    /// Why its variables are not told, if they could be.
    #[serde(rename = "variables_left_out", skip_serializing_if = "Option::is_none")]
    pub left_out: Option<String>,
}

impl Backtrace {
    pub(super) fn new(frames: &[Frame], end: UnwindEnd, locals: &Locals<'_>) -> Self {
        let mut frames_told: Vec<Place> = frames.iter().map(Place::of).collect();
        let variables = locals.of_stack(frames);
        let left_out = variables.as_ref().err().cloned();
        for (place, variables) in frames_told.iter_mut().zip(variables.unwrap_or_default()) {
            place.variables = variables;
        }
        Self { frames: frames_told, end, left_out }
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
