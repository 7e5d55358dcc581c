//! What must hold of the way from a crash to a plan: decoding code, unwinding, diagnosing, planning.

use std::collections::HashSet;
use std::time::Duration;

use diagnose::report::Variables;
use diagnose::state::{self, Sources};
use diagnose::unwind::{Limits, Start, walk};
use diagnose::{CodeCache, Diagnosis, Frame, FrameEffects, Trust, code, diagnose, report, tasks};
use guest::fake::{FakeMachine, PageSize};
use guest::{GuestPhys, GuestVirt, Hook, HookKind, Vcpu};
use quarantine::{Plan, Policy, Situation, Strikes, plan};
use repair_image::{CfaRule, FrameKind, RepairImage};

use crate::scene::{MODULE, Scene};

/// Tasks whose frames are looked at.
const MAX_TASKS: usize = 4;

/// Code: an instruction has 1 to 15 bytes and is the same whenever it is decoded; addresses that its operands
/// name can be computed; whole functions are analysed.
///
/// # Panics
/// When that does not hold.
pub fn instructions(data: &[u8]) {
    let mut machine = FakeMachine::new(64 << 10, false);
    let start = GuestVirt(MODULE);
    machine.map(start, GuestPhys(0), PageSize::Size4K);
    machine.poke(GuestPhys(0), data.get(..4096).unwrap_or(data));
    let space = machine.space();
    let len = data.len().min(256) as u64;
    for at in (0..len).map(|offset| start + offset) {
        let Some(found) = code::instruction_at(&space, at) else { continue };
        assert!((1..=15).contains(&found.len) && found.at == at);
        assert_eq!(found.next(), at + u64::from(found.len));
        assert!(!found.mnemonic.is_empty() && found.text.starts_with(&found.mnemonic));
        for (operand, memory) in found.accesses() {
            assert!(operand.read || operand.write);
            let _ = memory.address(&guest::Registers::unknown(), found.next());
        }
        let _ = found.branch_target();
        if let Some(call) = code::call_before(&space, found.next()) {
            assert_eq!(call.next(), found.next());
        }
    }
    let mut scene_data = vec![0; 2 + 20 * 8 + 2];
    scene_data.extend((data.len().min(4096) as u16).to_le_bytes());
    scene_data.extend(data.get(..4096).unwrap_or(data));
    let scene = Scene::new(&scene_data);
    let mut cache = CodeCache::new();
    for function in 0..6 {
        let at = GuestVirt(MODULE + function * 0x40);
        assert_eq!(
            cache.warm(&scene.image, &scene.machine.space(), at),
            cache.warm(&scene.image, &scene.machine.space(), at)
        );
    }
}

/// Unwinding from any registers over any memory: ends within its bound, never comes to the same place twice, and
/// goes outward except through a stack switch.
///
/// # Panics
/// When that does not hold.
pub fn unwinding(data: &[u8]) {
    let scene = Scene::new(data);
    let space = scene.machine.space();
    let mut cache = CodeCache::new();
    let limits = Limits { frames: 64 };
    let Some(start) = Start::of(&scene.registers) else { return };
    let (frames, _) = walk(&scene.image, &space, &mut cache, &start, limits);
    assert!((1..=64).contains(&frames.len()));
    outward(&scene.image, &frames);
    let Ok(all) = tasks::all(&scene.image, &space) else { return };
    for task in all.iter().take(MAX_TASKS) {
        let found = tasks::frames_of_sleeping(&scene.image, &space, task, &mut cache);
        if let Ok((frames, _)) = found {
            outward(&scene.image, &frames);
        }
    }
}

fn outward(image: &RepairImage, frames: &[Frame]) {
    // The last one may be where the walk noticed that it had been there before.
    let before = frames.split_last().map_or(frames, |(_, before)| before);
    let mut seen = HashSet::new();
    assert!(before.iter().all(|frame| seen.insert((frame.registers.rsp(), frame.pc.ip()))));
    for pair in frames.windows(2) {
        let [frame, caller] = pair else { continue };
        let row = image.unwind_row(frame.pc.lookup());
        if caller.trust == Trust::SavedRegisters {
            let partial = row.is_some_and(|row| row.kind == FrameKind::PartialRegs);
            assert_eq!(caller.saved_at.is_none(), partial, "{caller:?}");
            continue;
        }
        assert_eq!(frame.cfa, caller.registers.rsp(), "a caller's rsp is the CFA");
        let switches = row.is_some_and(|row| matches!(row.cfa, CfaRule::Deref { .. }));
        assert!(switches || frame.cfa > frame.registers.rsp(), "{frame:?}");
    }
}

/// A crash is diagnosed and planned for: numbers of frames are those of frames, text is fit for a terminal, the
/// same memory gives the same answer, and a plan has steps exactly when it has a rung.
///
/// # Panics
/// When that does not hold.
pub fn crash(data: &[u8]) {
    let scene = Scene::new(data);
    let space = scene.machine.space();
    let kinds =
        [HookKind::OopsBegin, HookKind::Panic, HookKind::DoubleFault, HookKind::StackOverflow];
    let kind = kinds.get(usize::from(scene.choice % 5));
    let hook = kind.zip(scene.registers.rip()).map(|(&kind, at)| Hook { kind, at });
    let answer = || {
        let mut cache = CodeCache::new();
        let phys = scene.machine.memory();
        diagnose(&scene.image, phys, &scene.registers, hook, Vcpu(0), &mut cache)
    };
    let found = answer();
    told(&scene, found.as_ref().ok());
    let Ok(found) = found else { return };
    consistent(&found);
    let json = serde_json::to_string(&found).expect("a diagnosis has a JSON form");
    let again = answer().map(|again| serde_json::to_string(&again).expect("as before"));
    assert_eq!(again.ok(), Some(json), "the same memory gives another diagnosis");
    let text = report::text(&found);
    fit_for_terminal(&text);
    assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");

    let situation = Situation {
        diagnosis: &found,
        image: &scene.image,
        memory: &space,
        vcpus: &[scene.registers],
    };
    let mut strikes = Strikes::default();
    let policy = Policy::default();
    for time in 0..4 {
        strikes.set_time(Duration::from_secs(time));
        let planned = plan(&situation, &policy, &strikes);
        let again = plan(&situation, &policy, &strikes);
        assert_eq!(planned.to_string(), again.to_string());
        sensible(&planned);
        let Some(rung) = planned.rung else { break };
        strikes.record(&found, rung);
    }
}

/// What the machine was doing is told whatever its memory holds, for people and for scripts.
fn told(scene: &Scene, diagnosis: Option<&Diagnosis>) {
    let sources = Sources {
        image: &scene.image,
        phys: scene.machine.memory(),
        vcpus: &[scene.registers],
        modules: &[],
        diagnosis,
        debug: None,
    };
    let state = state::of(&sources, &mut CodeCache::new());
    assert_eq!(state.cpus.len(), 1);
    for (title, text) in report::sections(&state, Variables::OfAll) {
        fit_for_terminal(&title);
        fit_for_terminal(&text);
    }
    serde_json::to_string(&state).expect("a state has a JSON form");
}

fn consistent(found: &Diagnosis) {
    let count = found.frames.len();
    assert!(found.fault_frame < count && !found.title.is_empty());
    let effects = |effects: &FrameEffects| {
        assert!(effects.held.iter().all(|held| held.frame < count));
        assert!(effects.undetermined.iter().all(|&frame| frame < count));
    };
    found.all_effects.iter().for_each(effects);
    if let Some(boundary) = &found.boundary {
        assert!(boundary.entry < boundary.frame && boundary.frame < count);
        assert!(found.fault_frame <= boundary.entry);
        effects(&boundary.effects);
        effects(&boundary.outer);
    }
}

fn fit_for_terminal(text: &str) {
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    assert!(!text.contains(steers), "{text:?}");
}

fn sensible(planned: &Plan) {
    fit_for_terminal(&planned.to_string());
    assert_eq!(planned.rung.is_none(), planned.actions.is_empty(), "{planned}");
    assert!(planned.refused.iter().all(|refusal| Some(refusal.rung) != planned.rung));
    assert!(planned.rung.is_some() || !planned.refused.is_empty());
    serde_json::to_string(planned).expect("a plan has a JSON form");
}

#[cfg(test)]
mod tests {
    use diagnose::Offender;

    use super::*;
    use crate::seed;

    #[test]
    fn the_seed_is_a_fault_of_a_driver() {
        let scene = Scene::new(&seed("crash", "fault"));
        let (mut cache, phys) = (CodeCache::new(), scene.machine.memory());
        let hook = scene.registers.rip().map(|at| Hook { kind: HookKind::OopsBegin, at });
        let found = diagnose(&scene.image, phys, &scene.registers, hook, Vcpu(0), &mut cache);
        let found = found.expect("a diagnosis");
        let driver =
            matches!(&found.offender, Some(Offender::Driver { module, .. }) if module == "m");
        assert!(driver && found.boundary.is_some(), "{}", report::text(&found));
        let space = scene.machine.space();
        let situation = Situation {
            diagnosis: &found,
            image: &scene.image,
            memory: &space,
            vcpus: &[scene.registers],
        };
        let planned = plan(&situation, &Policy::default(), &Strikes::default());
        assert!(planned.rung.is_some(), "{planned}\n{}", report::text(&found));
    }
}
