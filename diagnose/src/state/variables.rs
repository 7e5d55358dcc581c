//! Parameters and variables of frames, with the values they had. Their places come from the debug information of
//! modules; what a call has overwritten since is not shown.

use guest::{GuestVirt, LinkAddr};
use repair_image::{TypeShape, Variable, VariableLocation};
use serde::Serialize;

use super::Section;
use crate::kernel::Kernel;
use crate::{Diagnosis, Frame};

/// Frames from the fault outward that are looked at.
const FRAMES_MAX: usize = 64;
/// Variables of one frame at most.
const VARIABLES_MAX: usize = 64;

/// A variable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Value {
    /// Its name.
    pub name: String,
    /// Its type, as much as is known: `struct gauge *`.
    pub of: String,
    /// Guest-virtual address where it is kept, `None` for one in a register.
    pub at: Option<GuestVirt>,
    /// Its value: a pointer. `None` for a structure, and when its place is not known or can't be read.
    pub value: Option<GuestVirt>,
}

/// The variables of a frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FrameVariables {
    /// Index into the frames of the diagnosis.
    pub frame: usize,
    /// Pointers and structures, innermost scope first. Numbers are not kept in knowledge.
    pub variables: Vec<Value>,
}

pub(super) fn of(
    kernel: &Kernel<'_>,
    diagnosis: Option<&Diagnosis>,
) -> Section<Vec<FrameVariables>> {
    let Some(diagnosis) = diagnosis else { return Section::Unknown("nothing crashed".to_owned()) };
    let frames = diagnosis.frames.iter().enumerate().skip(diagnosis.fault_frame).take(FRAMES_MAX);
    let (mut of_modules, mut placed) = (0, false);
    let mut found = Vec::new();
    for (index, frame) in frames {
        let Some(module) = kernel.image.module_of_text(frame.pc.lookup()) else { continue };
        of_modules += 1;
        let known = module.knowledge.variables_at(LinkAddr(frame.pc.lookup().0));
        placed |= !known.is_empty() || module.knowledge.has_source();
        // Those that are there at all addresses are the module's own, not the frame's.
        let own = known.iter().filter(|it| !matches!(it.location, VariableLocation::Address(_)));
        let variables: Vec<Value> =
            own.take(VARIABLES_MAX).map(|variable| value(kernel, frame, variable)).collect();
        if !variables.is_empty() {
            found.push(FrameVariables { frame: index, variables });
        }
    }
    match (of_modules, placed) {
        (0, _) => Section::Unknown(
            "no frame is a module's, and places of the kernel's own variables are not kept"
                .to_owned(),
        ),
        (_, false) => Section::Unknown("there is no debug information of the module".to_owned()),
        _ => Section::Known(found),
    }
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
        at,
        value: value.map(GuestVirt),
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
        of(&Kernel::of_memory(&image, &space), Some(&diagnosis))
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
        assert_eq!(variable.value, Some(GuestVirt(0x1234)));
        let lost = look(Registers::unknown());
        assert_eq!(lost.known().unwrap()[0].variables[0].value, None);
    }
}
