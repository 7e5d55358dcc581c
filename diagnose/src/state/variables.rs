//! Parameters and variables of frames, with the values they had. Their places come from debug information that is at hand
//! (`locals.rs`), or else, for modules, from what knowledge has kept: pointers and structures. What a call has overwritten
//! since is not shown.

use std::fmt;

use guest::{GuestVirt, LinkAddr};
use repair_image::{Absent, TypeShape, Variable, VariableLocation, base_name};
use serde::{Serialize, Serializer};

use super::Section;
use super::locals::Locals;
use crate::kernel::Kernel;
use crate::{Diagnosis, Frame};

/// Frames from the fault outward that are looked at.
const FRAMES_MAX: usize = 64;
/// Variables of one frame at most.
const VARIABLES_MAX: usize = 64;

/// What a variable holds. In JSON a string.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Content {
    /// A pointer.
    Address(GuestVirt),
    /// A signed number.
    Signed(i64),
    /// An unsigned number.
    Unsigned(u64),
    /// `true` or `false`.
    Bool(bool),
    /// An enumerator, by its name.
    Name(String),
    /// A structure in registers: its parts, `None` for those not known.
    Parts(Vec<Option<u64>>),
}

impl fmt::Display for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(at) => write!(f, "{at:#x}"),
            Self::Signed(number) => write!(f, "{number}"),
            Self::Unsigned(number) => write!(f, "{number}"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Name(name) => f.write_str(name),
            Self::Parts(parts) => {
                let part = |part: &Option<u64>| {
                    part.map_or_else(|| "?".to_owned(), |bits| format!("{bits:#x}"))
                };
                let parts: Vec<String> = parts.iter().map(part).collect();
                write!(f, "{{{}}}", parts.join(", "))
            }
        }
    }
}

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Address(at) => at.serialize(serializer),
            other => serializer.collect_str(other),
        }
    }
}

/// A variable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// Its type, as much as is known: `gauge *`.
    pub of: String,
    /// The inlined function whose it is; `None` for the frame's own function.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inlined: Option<String>,
    /// Guest-virtual address where it is kept, `None` for one in a register.
    pub at: Option<GuestVirt>,
    /// Its value. `None` for a structure, and when its place is not known or can't be read.
    pub value: Option<Content>,
    /// The string that it points to, if that is plain text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Why nothing is known of it, where that can be told.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub absent: Option<Absent>,
}

/// The variables of a frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrameVariables {
    /// Index into the frames of the diagnosis.
    pub frame: usize,
    /// Function without compiler suffixes.
    pub function: Option<String>,
    /// Innermost scope first. Of a module whose file is not at hand pointers and structures: knowledge does not keep
    /// numbers.
    pub variables: Vec<Value>,
}

pub(super) fn of(
    kernel: &Kernel<'_>,
    diagnosis: Option<&Diagnosis>,
    locals: &Locals<'_>,
) -> Section<Vec<FrameVariables>> {
    let Some(diagnosis) = diagnosis else { return Section::Unknown("nothing crashed".to_owned()) };
    let frames = diagnosis.frames.iter().enumerate().skip(diagnosis.fault_frame).take(FRAMES_MAX);
    let (mut of_modules, mut placed) = (false, false);
    let mut found = Vec::new();
    for (index, frame) in frames {
        let variables = match locals.of_frame(&diagnosis.frames, index) {
            Some(variables) => {
                placed = true;
                variables
            }
            None => {
                let kept = kept(kernel, frame);
                of_modules |= kept.is_some();
                placed |= kept.as_ref().is_some_and(|kept| kept.placed);
                kept.map(|kept| kept.variables).unwrap_or_default()
            }
        };
        if !variables.is_empty() {
            let function = frame.function.as_deref().map(|name| base_name(name).to_owned());
            found.push(FrameVariables { frame: index, function, variables });
        }
    }
    match (placed, of_modules) {
        (true, _) => Section::Known(found),
        (false, true) => {
            Section::Unknown("there is no debug information of the module".to_owned())
        }
        (false, false) => Section::Unknown(
            "no frame is a module's, and the kernel's own variables are in its vmlinux only, which is not at hand"
                .to_owned(),
        ),
    }
}

/// What knowledge has kept of the variables of a module's frame.
struct Kept {
    variables: Vec<Value>,
    /// Whether there was debug information.
    placed: bool,
}

fn kept(kernel: &Kernel<'_>, frame: &Frame) -> Option<Kept> {
    let module = kernel.image.module_of_text(frame.pc.lookup())?;
    let known = module.knowledge.variables_at(LinkAddr(frame.pc.lookup().0));
    let placed = !known.is_empty() || module.knowledge.has_source();
    // Those that are there at all addresses are the module's own, not the frame's.
    let own = known.iter().filter(|it| !matches!(it.location, VariableLocation::Address(_)));
    let variables = own.take(VARIABLES_MAX).map(|variable| value(kernel, frame, variable));
    Some(Kept { variables: variables.collect(), placed })
}

fn value(kernel: &Kernel<'_>, frame: &Frame, variable: &Variable) -> Value {
    let at = match variable.location {
        VariableLocation::AtRegister(reg, offset) => {
            frame.registers.get(reg).map(|base| GuestVirt(base).offset(i64::from(offset)))
        }
        VariableLocation::AtCfa(offset) => frame.cfa.map(|cfa| cfa.offset(i64::from(offset))),
        VariableLocation::Address(at) => Some(at),
        _ => None,
    };
    let value = match (variable.location, &variable.shape) {
        (_, TypeShape::Aggregate { .. }) => None,
        (VariableLocation::Register(reg), _) => frame.registers.get(reg),
        _ => at.and_then(|at| kernel.memory.read_u64(at).ok()),
    };
    Value {
        name: variable.name.clone(),
        of: words(&variable.shape),
        inlined: None,
        at,
        value: value.map(|value| Content::Address(GuestVirt(value))),
        text: None,
        absent: None,
    }
}

fn words(shape: &TypeShape) -> String {
    match shape {
        TypeShape::Pointer { to: Some(to) } => format!("{to} *"),
        TypeShape::Pointer { to: None } => "void *".to_owned(),
        TypeShape::Aggregate { name, .. } => name.clone(),
        TypeShape::Int { name, .. } | TypeShape::Enum { name, .. } => name.clone(),
        TypeShape::Bool => "bool".to_owned(),
        _ => "?".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use guest::{CodeAddress, Reg, Registers};

    use super::*;
    use crate::testing::{Guest, MODULE, diagnosis};

    fn look(registers: Registers) -> Section<Vec<FrameVariables>> {
        let mut guest = Guest::new().function("f", MODULE, 0x40).pointer(
            "g",
            "gauge",
            Reg::Rbx,
            MODULE..MODULE + 0x40,
        );
        let mut diagnosis = diagnosis();
        diagnosis.frames[2].pc = CodeAddress::Return(GuestVirt(MODULE + 0x10));
        diagnosis.frames[2].registers = registers;
        let image = guest.image();
        let space = guest.machine.space();
        let kernel = Kernel::of_memory(&image, &space);
        of(&kernel, Some(&diagnosis), &Locals::new(kernel, None))
    }

    #[test]
    fn a_pointer_in_a_register_has_its_value_or_none() {
        let found = look(Registers::unknown().with(Reg::Rbx, 0x1234));
        let found = &found.known().unwrap()[0];
        let variable = &found.variables[0];
        assert_eq!(
            (found.frame, variable.name.as_str(), variable.of.as_str()),
            (2, "g", "gauge *")
        );
        assert_eq!(variable.value, Some(Content::Address(GuestVirt(0x1234))));
        let lost = look(Registers::unknown());
        assert_eq!(lost.known().unwrap()[0].variables[0].value, None);
    }
}
