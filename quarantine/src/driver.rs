//! Rung 2: every entry point of a driver fails cleanly from now on, and its pending activity is
//! called off. Which functions are entry points is `entries.rs`'s, what they return `values.rs`'s.

use guest::{GuestVirt, Reg};
use repair_image::Module;
use repair_image::payload::MAX_CALLS;

use crate::action::Action;
use crate::entries::{self, EntryPoint};
use crate::guest_struct::Structures;
use crate::plan::{Situation, Steps};
use crate::values::{self, Value};
use crate::{
    Policy, Reason, Standing, activity, error_return, network, process, requests, sleepers,
};

/// `endbr64`, with which a function starts that may be called indirectly (kernels with IBT).
const ENDBR: [u8; 4] = [0xf3, 0x0f, 0x1e, 0xfa];
/// The five-byte no-operation that stands where ftrace may put a call, one instruction
/// (arch/x86/include/asm/nops.h: `BYTES_NOP5`).
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0x00, 0x00];

/// The steps that quarantine the driver `name` and leave the crashed call.
pub(crate) fn steps(
    situation: &Situation<'_>,
    policy: &Policy,
    standing: &Standing,
    name: &str,
) -> Result<Steps, Reason> {
    if policy.protects_driver(name) {
        return Err(Reason::ProtectedDriver { module: name.to_owned() });
    }
    if !standing.escalate() {
        return Err(Reason::StrikesLeft {
            module: name.to_owned(),
            strikes: standing.strikes,
            limit: policy.strikes,
        });
    }
    let module = situation
        .image
        .modules
        .iter()
        .find(|module| module.name == name)
        .ok_or_else(|| Reason::UnknownModule { module: name.to_owned() })?;
    // The crashed call itself must end too: by an error, or with its process.
    let way_out = match error_return::steps(situation, policy) {
        Ok(steps) => steps,
        Err(reason) => process::steps(situation, policy).map_err(|_| reason)?,
    };
    let structures = Structures { image: situation.image, memory: situation.memory };
    let found = entries::of(&structures, module);
    let mut steps = Steps::default();
    patch_all(situation, module, &found, &mut steps)?;
    steps.actions.extend(pin(&structures, module)?);
    // Locks are released first: what follows takes locks of its own. All calls make one run.
    let is_call = |action: &&Action| matches!(action, Action::CallGuest { .. });
    let calls = way_out.actions.iter().take_while(is_call).count();
    let (release, leave) = way_out.actions.split_at(calls);
    steps.actions.extend_from_slice(release);
    // One run takes so many calls: first what nobody else would ever do.
    let mut calm = requests::end(situation, module, &mut steps.notes);
    calm.extend(sleepers::wake(situation, module, &mut steps.notes));
    calm.extend(activity::stop(&structures, module, &mut steps));
    calm.extend(network::unplug(&structures, module, &mut steps.notes));
    let room = MAX_CALLS.saturating_sub(release.len());
    if calm.len() > room {
        steps.notes.push(format!("{} calls too many are left out", calm.len() - room));
    }
    steps.actions.extend(calm.into_iter().take(room));
    steps.actions.extend_from_slice(leave);
    steps.notes.extend(way_out.notes);
    Ok(steps)
}

fn patch_all(
    situation: &Situation<'_>,
    module: &Module,
    found: &[EntryPoint],
    steps: &mut Steps,
) -> Result<(), Reason> {
    if found.is_empty() {
        return Err(Reason::NoEntries { module: module.name.clone() });
    }
    let untyped: Vec<String> = found
        .iter()
        .filter(|entry| entry.prototype.is_none())
        .map(|entry| entry.name.clone())
        .collect();
    if !untyped.is_empty() {
        return Err(Reason::UntypedEntries { functions: untyped });
    }
    for entry in found {
        if let Some(action) = patch(situation, module, entry)? {
            steps.actions.push(action);
        }
    }
    if steps.actions.is_empty() {
        steps.notes.push(format!("every entry point of {} fails already", module.name));
    }
    Ok(())
}

/// The patch of one entry point; `None` when it is there already.
fn patch(
    situation: &Situation<'_>,
    module: &Module,
    entry: &EntryPoint,
) -> Result<Option<Action>, Reason> {
    let Some(prototype) = &entry.prototype else { return Ok(None) };
    let types = &*situation.image.types;
    let value = values::stub_value(prototype, &entry.name, entry.role, types)?;
    let refuse =
        |why: &str| Reason::Unpatchable { function: entry.name.clone(), why: why.to_owned() };
    let code = stub(&value).ok_or_else(|| refuse("its value does not fit into a patch"))?;
    let mut start = [0; ENDBR.len() + NOP5.len()];
    let start = start.get_mut(..start_len(entry.size)).unwrap_or_default();
    situation
        .memory
        .read(entry.at, start)
        .map_err(|_| Reason::Unreadable { what: entry.name.clone(), at: entry.at })?;
    let skip = if start.starts_with(&ENDBR) { ENDBR.len() } else { 0 };
    let here = start.get(skip..).unwrap_or_default();
    if here.starts_with(&code) {
        return Ok(None);
    }
    if !here.starts_with(&NOP5) {
        return Err(refuse(match here.first() {
            Some(0xe8) => "it is being traced or live-patched",
            Some(0xe9 | 0xcc) => "somebody has patched it already",
            _ => "it does not start with the no-operation that the kernel reserves for patching",
        }));
    }
    let at = entry.at + skip as u64;
    check_positions(situation, entry, at, code.len() as u64)?;
    Ok(Some(Action::PatchEntry {
        module: module.name.clone(),
        function: entry.name.clone(),
        at,
        old: NOP5.get(..code.len()).unwrap_or(&NOP5).to_vec(),
        new: code,
        why: format!("{}; {}", entry.found, value.why),
        returns: value,
    }))
}

fn start_len(size: u64) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX).min(ENDBR.len() + NOP5.len())
}

/// Code that returns a value: `push imm8; pop rax; ret`, or `ret` alone. At most four bytes, so
/// that it fits into the no-operation: no instruction of the function's body is touched, and no
/// jump can lead into it. With return thunks in use a plain `ret` is still architecturally right.
fn stub(value: &Value) -> Option<Vec<u8>> {
    const RET: u8 = 0xc3;
    match value.number {
        None => Some(vec![RET]),
        Some(number) => {
            let byte = i8::try_from(number).ok()?;
            Some(vec![0x6a, byte.to_le_bytes()[0], 0x58, RET])
        }
    }
}

/// Nobody may stand inside the changed bytes. They are one instruction, at whose start it is safe
/// to stand: the function has not done anything yet. A return address can't lie inside an
/// instruction, so sleeping tasks need no check; a vCPU could stand there only if the bytes were
/// executed as something else.
fn check_positions(
    situation: &Situation<'_>,
    entry: &EntryPoint,
    at: GuestVirt,
    len: u64,
) -> Result<(), Reason> {
    for (index, registers) in situation.vcpus.iter().enumerate() {
        let inside =
            registers.get(Reg::Rip).is_some_and(|rip| rip > at.0 && rip < at.wrapping_add(len).0);
        if inside {
            return Err(Reason::Occupied {
                who: format!("vCPU {index}"),
                function: entry.name.clone(),
            });
        }
    }
    Ok(())
}

/// Keeps the module from being unloaded: its `remove` no longer gives back interrupts and timers,
/// which would then fire into freed memory.
fn pin(structures: &Structures<'_>, module: &Module) -> Result<Option<Action>, Reason> {
    let Some(count) = structures.number(module.at, "module", "refcnt")? else { return Ok(None) };
    let Some(at) = structures.member_at(module.at, "module", "refcnt") else { return Ok(None) };
    Ok(Some(Action::WriteWord {
        at,
        size: 4,
        mask: 0xffff_ffff,
        old: count & 0xffff_ffff,
        new: count.wrapping_add(1) & 0xffff_ffff,
        name: format!("reference count of {}", module.name),
        why: "a quarantined driver must stay loaded: others may still point to its functions"
            .to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{MODULE_TEXT, Scene};
    use guest::Registers;

    fn run(scene: &Scene, vcpus: &[Registers]) -> Result<Steps, Reason> {
        let space = scene.machine.space();
        let diagnosis = scene.diagnosis();
        let situation =
            Situation { diagnosis: &diagnosis, image: &scene.image, memory: &space, vcpus };
        let policy = Policy { strikes: 1, ..Policy::default() };
        let standing = crate::Strikes::default().standing(&diagnosis, &policy);
        steps(&situation, &policy, &standing, "toy")
    }

    #[test]
    fn every_entry_point_fails_by_its_type() {
        let steps = run(&Scene::new(), &[]).unwrap();
        let stubs: Vec<(String, Vec<u8>)> = steps
            .actions
            .iter()
            .filter_map(|action| match action {
                Action::PatchEntry { function, new, .. } => Some((function.clone(), new.clone())),
                _ => None,
            })
            .collect();
        assert_eq!(
            stubs,
            [
                ("toy_write".to_owned(), vec![0x6a, 0xfb, 0x58, 0xc3]),
                ("toy_open".to_owned(), vec![0x6a, 0xed, 0x58, 0xc3]),
                ("toy_release".to_owned(), vec![0x6a, 0x00, 0x58, 0xc3]),
                ("toy_timer".to_owned(), vec![0xc3]),
            ]
        );
        assert!(matches!(steps.actions.last(), Some(Action::SetRegisters { .. })));
        assert!(
            steps
                .actions
                .iter()
                .any(|action| matches!(action, Action::WriteWord { old: 1, new: 2, size: 4, .. }))
        );
    }

    #[test]
    fn an_entry_point_of_unknown_type_refuses() {
        let mut scene = Scene::new();
        scene.poke_word(MODULE_TEXT + 0x2400, (MODULE_TEXT + 4 * 0x40).0);
        let refused = run(&scene, &[]).unwrap_err();
        assert_eq!(refused, Reason::UntypedEntries { functions: vec!["toy_helper".to_owned()] });
    }

    #[test]
    fn a_vcpu_inside_the_patch_refuses_and_one_at_its_start_does_not() {
        let scene = Scene::new();
        let at = |rip: GuestVirt| Registers::unknown().with(Reg::Rip, rip.0);
        assert!(run(&scene, &[at(MODULE_TEXT)]).is_ok());
        assert!(matches!(run(&scene, &[at(MODULE_TEXT + 1)]), Err(Reason::Occupied { .. })));
        assert!(run(&scene, &[at(MODULE_TEXT + 5)]).is_ok());
    }

    #[test]
    fn traced_functions_are_refused() {
        let mut scene = Scene::new();
        scene.machine.poke_virt(MODULE_TEXT, &[0xe8, 1, 2, 3, 4]);
        assert!(matches!(run(&scene, &[]), Err(Reason::Unpatchable { .. })));
    }

    #[test]
    fn a_stub_is_at_most_four_bytes() {
        let value = |number| Value { number, name: String::new(), why: String::new() };
        assert_eq!(stub(&value(Some(-5))).map(|code| code.len()), Some(4));
        assert_eq!(stub(&value(Some(300))), None);
    }
}
