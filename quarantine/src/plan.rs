//! The plan: which rung of the ladder is taken, its steps, and why not more and not less. Made from
//! a diagnosis by a pure function: guest memory is read, nothing is written.

use std::fmt;

use std::time::Duration;

use diagnose::{CrashClass, Diagnosis, Offender};
use guest::{GuestVirt, Registers, Vcpu, VirtMemory};
use repair_image::RepairImage;
use serde::Serialize;

use crate::invariants::{self, Current};
use crate::{
    Action, Policy, Reason, Refusal, Standing, Strikes, bit_locks, core_return, driver,
    error_return, in_hand, lists, process, queue, stack_end, text, warning,
};

/// A rung of the recovery ladder that repairs in place.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Rung {
    /// Rung 1: return an error out of the driver.
    ReturnError,
    /// Rung 2: every entry point of the driver fails cleanly from now on.
    QuarantineDriver,
    /// Rung 3: the process ends through the kernel's own exit path.
    QuarantineProcess,
    /// Rung 4: text, read-only data and IDT are put back from the repair image.
    RepairKernel,
}

impl Rung {
    /// All rungs, from the bottom.
    pub const ALL: [Rung; 4] =
        [Self::ReturnError, Self::QuarantineDriver, Self::QuarantineProcess, Self::RepairKernel];

    /// Number on the ladder.
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::ReturnError => 1,
            Self::QuarantineDriver => 2,
            Self::QuarantineProcess => 3,
            Self::RepairKernel => 4,
        }
    }
}

impl fmt::Display for Rung {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let words = match self {
            Self::ReturnError => "return an error",
            Self::QuarantineDriver => "quarantine the driver",
            Self::QuarantineProcess => "quarantine the process",
            Self::RepairKernel => "repair the kernel",
        };
        write!(f, "rung {} ({words})", self.number())
    }
}

/// What a plan is made from. Everything is read only.
pub struct Situation<'a> {
    /// The diagnosis.
    pub diagnosis: &'a Diagnosis,
    /// The repair image in use.
    pub image: &'a RepairImage,
    /// The kernel's memory, guest-virtual.
    pub memory: &'a dyn VirtMemory,
    /// Registers of all vCPUs, by vCPU number; none may stand where code is patched.
    pub vcpus: &'a [Registers],
}

/// Steps of one rung.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps {
    /// In the order of execution.
    pub(crate) actions: Vec<Action>,
    /// What a person should know.
    pub(crate) notes: Vec<String>,
    /// How the guest goes on after a repair of rung 4.
    pub(crate) way: Option<text::Way>,
}

/// What would be done about a crash.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    /// The rung taken; `None` when all are refused and the crash takes its stock course.
    pub rung: Option<Rung>,
    /// Title of the crash.
    pub title: String,
    /// Signature of the crash.
    pub signature: String,
    /// Steps, in the order of execution.
    pub actions: Vec<Action>,
    /// Rungs not taken, from the bottom, and why.
    pub refused: Vec<Refusal>,
    /// What is lost, and what was assumed.
    pub notes: Vec<String>,
    /// What the guest loses, in words.
    pub loss: String,
    /// vCPU that crashed; guest functions are called on it.
    pub vcpu: Vcpu,
    /// Guest-virtual address of that vCPU's preempt count; it is raised while calls are made.
    pub preempt_count_at: Option<GuestVirt>,
    /// The task and CPU that crashed: the guest must be sound around them once all is done.
    #[serde(skip)]
    pub(crate) current: Option<Current>,
    /// Kernel addresses that the crashed call had in hand: what they point into must be sound too.
    #[serde(skip)]
    pub(crate) in_hand: Vec<GuestVirt>,
    /// Longest time that calls into the guest may take, milliseconds.
    pub limit_ms: u64,
}

impl Plan {
    /// Whether code of the guest's kernel is called, for which fresh memory is needed.
    #[must_use]
    pub fn calls_guest(&self) -> bool {
        self.actions.iter().any(|action| matches!(action, Action::CallGuest { .. }))
    }

    /// Longest time that calls into the guest may take.
    #[must_use]
    pub fn limit(&self) -> Duration {
        Duration::from_millis(self.limit_ms)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "crash: {}", self.title)?;
        match self.rung {
            Some(rung) => writeln!(f, "plan:  {rung}; the guest loses {}", self.loss)?,
            None => writeln!(f, "plan:  none; the crash takes its stock course")?,
        }
        for (index, action) in self.actions.iter().enumerate() {
            writeln!(f, "  {:>2}. {action}", index + 1)?;
        }
        for refusal in &self.refused {
            writeln!(f, "why not {}: {}", refusal.rung, refusal.text)?;
        }
        for note in &self.notes {
            writeln!(f, "note: {note}")?;
        }
        Ok(())
    }
}

/// Decides what to do about a crash. `strikes` must not count this crash yet. Reads only.
#[must_use]
pub fn plan(situation: &Situation<'_>, policy: &Policy, strikes: &Strikes) -> Plan {
    let standing = strikes.standing(situation.diagnosis, policy);
    let mut refused = Vec::new();
    let in_hand = in_hand::addresses(situation);
    let repair = is_damaged(situation.diagnosis).then_some(Rung::RepairKernel);
    for rung in repair.into_iter().chain(order(situation.diagnosis, &standing)) {
        match attempt(situation, policy, &standing, rung, &in_hand) {
            Ok(steps) => {
                let plan = taken(situation, rung, steps, refused, &standing, policy);
                return Plan { in_hand, ..plan };
            }
            Err(reason) => refused.push(Refusal::new(rung, reason)),
        }
    }
    finish(situation, policy, None, Steps::default(), refused)
}

fn finish(
    situation: &Situation<'_>,
    policy: &Policy,
    rung: Option<Rung>,
    steps: Steps,
    mut refused: Vec<Refusal>,
) -> Plan {
    refused.sort_by_key(|refusal| refusal.rung);
    Plan {
        rung,
        title: situation.diagnosis.title.clone(),
        signature: situation.diagnosis.signature.clone(),
        actions: steps.actions,
        refused,
        notes: steps.notes,
        loss: rung.map_or_else(|| "everything".to_owned(), |rung| loss(situation, rung, steps.way)),
        vcpu: situation.diagnosis.vcpu,
        preempt_count_at: situation.diagnosis.context.preempt_count_at,
        current: Current::of(situation.diagnosis),
        in_hand: Vec::new(),
        limit_ms: policy.max_downtime_ms,
    }
}

/// Rungs in the order in which they are tried. A driver whose strikes are used up is quarantined if
/// that can be done; if not, an error return is still better than a crash.
fn order(diagnosis: &Diagnosis, standing: &Standing) -> Vec<Rung> {
    match diagnosis.offender {
        _ if is_left_behind(diagnosis) => vec![Rung::ReturnError, Rung::QuarantineProcess],
        Some(Offender::Driver { .. }) if standing.escalate() => {
            vec![Rung::QuarantineDriver, Rung::ReturnError, Rung::QuarantineProcess]
        }
        _ => Rung::ALL.into_iter().filter(|&rung| rung != Rung::RepairKernel).collect(),
    }
}

/// Whether there is damage that rung 4 would put back. It is then tried first: lower rungs leave the damage
/// to whoever comes next.
fn is_damaged(diagnosis: &Diagnosis) -> bool {
    !diagnosis.damage.is_empty()
}

/// Whether it is about a task that the quarantine of its driver has left inside: the driver has nothing more to lose.
fn is_left_behind(diagnosis: &Diagnosis) -> bool {
    diagnosis.class == Some(CrashClass::EndlessSleep)
}

/// Whether the crash itself says that somebody has written or freed what is not theirs. Once may be a bad argument; a
/// driver that does it again and again has broken more than what is seen, and only being rid of it helps.
fn is_memory_broken(diagnosis: &Diagnosis) -> bool {
    matches!(
        diagnosis.class,
        Some(
            CrashClass::ListCorruption
                | CrashClass::Usercopy
                | CrashClass::DoubleFree
                | CrashClass::SlabCorruption
        )
    )
}

fn attempt(
    situation: &Situation<'_>,
    policy: &Policy,
    standing: &Standing,
    rung: Rung,
    in_hand: &[GuestVirt],
) -> Result<Steps, Reason> {
    if !policy.rungs.contains(&rung) {
        return Err(Reason::NotAllowed);
    }
    if rung != Rung::RepairKernel && situation.diagnosis.class == Some(CrashClass::DoubleFault) {
        return Err(Reason::LostInterrupt);
    }
    if standing.used_up && rung != Rung::QuarantineDriver && is_memory_broken(situation.diagnosis) {
        return Err(standing.broken_memory());
    }
    // The task runs on whatever rung is taken, if only to its end.
    if let Some(current) = Current::of(situation.diagnosis) {
        invariants::before(situation.image, situation.memory, current, in_hand)?;
    }
    if abandons(situation.diagnosis, rung) {
        bit_locks::check(situation, rung)?;
    }
    lists::check(situation)?;
    let mark = stack_end::restore(situation)?;
    let out_of_queue = queue::leave(situation)?;
    let mut steps = rung_steps(situation, policy, standing, rung)?;
    // First of all: whoever unlocks looks at the queue.
    steps.actions.splice(0..0, out_of_queue);
    steps.actions.splice(0..0, mark);
    Ok(steps)
}

/// Whether the crashed call is not gone on with: one that only warned is, and one whose code was damaged is run again.
fn abandons(diagnosis: &Diagnosis, rung: Rung) -> bool {
    rung != Rung::RepairKernel && !warning::is_one(diagnosis)
}

fn rung_steps(
    situation: &Situation<'_>,
    policy: &Policy,
    standing: &Standing,
    rung: Rung,
) -> Result<Steps, Reason> {
    match (rung, situation.diagnosis.offender.as_ref()) {
        (Rung::RepairKernel, _) => text::steps(situation, policy),
        // Whoever warned: nothing is abandoned.
        (Rung::ReturnError, _) if warning::is_one(situation.diagnosis) => warning::steps(situation),
        (_, None) => Err(Reason::NoOffender),
        (Rung::ReturnError, Some(Offender::Process { .. } | Offender::Kernel { .. })) => {
            if standing.escalate() {
                return Err(standing.why());
            }
            core_return::steps(situation, policy)
        }
        (Rung::ReturnError, Some(Offender::Driver { .. })) => {
            let escalate = standing.escalate() && !is_left_behind(situation.diagnosis);
            if escalate && !policy.return_error_when_quarantine_fails {
                return Err(standing.why());
            }
            error_return::steps(situation, policy)
        }
        (Rung::QuarantineDriver, Some(Offender::Driver { module, .. })) => {
            driver::steps(situation, policy, standing, module)
        }
        (Rung::QuarantineProcess, Some(Offender::Driver { .. } | Offender::Process { .. })) => {
            process::steps(situation, policy)
        }
        (Rung::QuarantineProcess, Some(_)) => Err(Reason::OtherOffender { wanted: "process" }),
        (_, Some(_)) => Err(Reason::OtherOffender { wanted: "driver" }),
    }
}

fn taken(
    situation: &Situation<'_>,
    rung: Rung,
    steps: Steps,
    mut refused: Vec<Refusal>,
    standing: &Standing,
    policy: &Policy,
) -> Plan {
    for other in Rung::ALL {
        if other == Rung::RepairKernel && !is_damaged(situation.diagnosis) {
            continue;
        }
        if other != rung && !refused.iter().any(|refusal| refusal.rung == other) {
            let reason = not_tried(situation, rung, other, standing, policy);
            refused.push(Refusal::new(other, reason));
        }
    }
    finish(situation, policy, Some(rung), steps, refused)
}

/// Why a rung was not even tried.
fn not_tried(
    situation: &Situation<'_>,
    taken: Rung,
    other: Rung,
    standing: &Standing,
    policy: &Policy,
) -> Reason {
    if taken == Rung::RepairKernel {
        return Reason::DamageStays;
    }
    if other == Rung::QuarantineDriver && is_left_behind(situation.diagnosis) {
        return Reason::NotNeeded;
    }
    if other < taken {
        return standing.why();
    }
    match &situation.diagnosis.offender {
        Some(Offender::Driver { module, .. })
            if other == Rung::QuarantineDriver && !standing.escalate() =>
        {
            Reason::StrikesLeft {
                module: module.clone(),
                strikes: standing.strikes,
                limit: policy.strikes,
            }
        }
        _ => Reason::NotNeeded,
    }
}

fn loss(situation: &Situation<'_>, rung: Rung, way: Option<text::Way>) -> String {
    let rung = match way {
        Some(text::Way::Retry) => return "nothing".to_owned(),
        Some(text::Way::ErrorReturn) => Rung::ReturnError,
        Some(text::Way::EndProcess) => Rung::QuarantineProcess,
        None => rung,
    };
    match (rung, &situation.diagnosis.offender, &situation.diagnosis.task) {
        (Rung::ReturnError, ..) => "one call".to_owned(),
        (Rung::QuarantineDriver, Some(Offender::Driver { module, .. }), _) => {
            format!("the driver {module}")
        }
        (Rung::QuarantineProcess, _, Some(task)) => {
            format!("the process {} (pid {})", task.comm, task.tgid)
        }
        _ => "what the rung quarantines".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use diagnose::ResourceKind;
    use proptest::prelude::*;

    use super::*;
    use crate::testing::Scene;

    fn plan_of(scene: &Scene, diagnosis: &Diagnosis, policy: &Policy) -> Plan {
        let space = scene.machine.space();
        let situation = Situation { diagnosis, image: &scene.image, memory: &space, vcpus: &[] };
        plan(&situation, policy, &Strikes::default())
    }

    #[test]
    fn the_printed_plan() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        scene.hold(&mut diagnosis, &[ResourceKind::Mutex, ResourceKind::BottomHalves]);
        let text = plan_of(&scene, &diagnosis, &Policy::default()).to_string();
        let expected = "\
crash: BUG: kernel NULL pointer dereference in toy_write
plan:  rung 1 (return an error); the guest loses one call
   1. call mutex_unlock(0xffff888000000800): mutex lock_0 was taken by toy_write, which is abandoned
   2. write __preempt_count at 0xffff888000001020: 0x200 -> 0x0: what the abandoned frames added and no \
unlock function takes off
   3. set registers of vCPU 0: vfs_write continues: toy_write returns -EIO (the call fails), interrupts on
       rax=0xfffffffffffffffb rbx=0x10 rsp=0xffffc90000003800 rbp=0x11 r12=0x12 r13=0x13 r14=0x14 \
r15=0x15 rip=0xffffffff81000020 rflags=0x202
why not rung 2 (quarantine the driver): not needed yet: toy has 1 of 3 strikes
why not rung 3 (quarantine the process): not needed: a lower rung repairs it
note: memory, references and device state that the abandoned frames had in hand are not given back
";
        assert_eq!(text, expected);
    }

    #[test]
    fn json_carries_typed_reasons_and_hex_addresses() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        diagnosis.offender = None;
        let plan = plan_of(&scene, &diagnosis, &Policy::default());
        assert_eq!(plan.rung, None);
        let json = serde_json::to_value(&plan).unwrap();
        assert_eq!(json["refused"][0]["reason"]["code"], "no_offender");
        assert!(json["refused"][0]["text"].as_str().unwrap().contains("at fault"));
        let plan = plan_of(&scene, &scene.diagnosis(), &Policy::default());
        let json = serde_json::to_value(&plan).unwrap();
        assert_eq!(json["rung"], "return_error");
        assert_eq!(json["actions"][0]["registers"]["rip"], "0xffffffff81000020");
    }

    #[test]
    fn the_ladder_is_climbed_only_as_far_as_needed() {
        let scene = Scene::new();
        let diagnosis = scene.diagnosis();
        let mut policy = Policy::default();
        assert_eq!(plan_of(&scene, &diagnosis, &policy).rung, Some(Rung::ReturnError));
        policy.strikes = 1;
        assert_eq!(plan_of(&scene, &diagnosis, &policy).rung, Some(Rung::QuarantineDriver));
        policy.never_quarantine.push("toy".to_owned());
        assert_eq!(plan_of(&scene, &diagnosis, &policy).rung, Some(Rung::ReturnError));
        policy.return_error_when_quarantine_fails = false;
        assert_eq!(plan_of(&scene, &diagnosis, &policy).rung, Some(Rung::QuarantineProcess));
        policy.never_kill.push("worker".to_owned());
        assert_eq!(plan_of(&scene, &diagnosis, &policy).rung, None);
        let core = scene.core_diagnosis();
        let plan = plan_of(&scene, &core, &Policy::default());
        assert_eq!(plan.rung, Some(Rung::QuarantineProcess));
        assert_eq!(plan.loss, "the process worker (pid 300)");
    }

    #[test]
    fn who_was_left_inside_a_quarantined_driver_is_sent_back() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        diagnosis.class = Some(CrashClass::EndlessSleep);
        let policy =
            Policy { strikes: 1, return_error_when_quarantine_fails: false, ..Policy::default() };
        let plan = plan_of(&scene, &diagnosis, &policy);
        assert_eq!(plan.rung, Some(Rung::ReturnError));
        diagnosis.boundary = None;
        assert_eq!(plan_of(&scene, &diagnosis, &policy).rung, Some(Rung::QuarantineProcess));
    }

    #[test]
    fn who_breaks_memory_again_and_again_is_not_let_go_on() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        let mut policy = Policy { strikes: 1, ..Policy::default() };
        policy.never_quarantine.push("toy".to_owned());
        assert_eq!(plan_of(&scene, &diagnosis, &policy).rung, Some(Rung::ReturnError));
        diagnosis.class = Some(CrashClass::DoubleFree);
        assert_eq!(plan_of(&scene, &diagnosis, &Policy::default()).rung, Some(Rung::ReturnError));
        let plan = plan_of(&scene, &diagnosis, &policy);
        assert_eq!(plan.rung, None);
        let broken = |refusal: &&Refusal| matches!(refusal.reason, Reason::BrokenMemory { .. });
        assert_eq!(plan.refused.iter().filter(broken).count(), 2, "rungs 1 and 3");
        policy.never_quarantine.clear();
        assert_eq!(plan_of(&scene, &diagnosis, &policy).rung, Some(Rung::QuarantineDriver));
    }

    #[test]
    fn after_a_double_fault_an_interrupt_may_be_missing() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        diagnosis.class = Some(CrashClass::DoubleFault);
        let plan = plan_of(&scene, &diagnosis, &Policy::default());
        assert_eq!(plan.rung, None);
        assert!(plan.refused.iter().any(|refusal| refusal.reason == Reason::LostInterrupt));
    }

    #[test]
    fn a_driver_crash_without_a_boundary_costs_the_process() {
        let scene = Scene::new();
        let mut diagnosis = scene.diagnosis();
        diagnosis.boundary = None;
        let plan = plan_of(&scene, &diagnosis, &Policy::default());
        assert_eq!(plan.rung, Some(Rung::QuarantineProcess));
        assert_eq!(plan.refused[0].reason, Reason::NoBoundary);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn any_diagnosis_gives_a_plan(
            words in proptest::collection::vec(any::<u64>(), 24),
            bytes in proptest::collection::vec(any::<u8>(), 24),
            deltas in any::<(i64, i64, i64, i64)>(),
        ) {
            let scene = Scene::new();
            let diagnosis = crate::testing::wild_diagnosis(&scene, &words, &bytes, deltas);
            let policy = Policy {
                strikes: u32::from(bytes[0] & 3) + 1,
                correct_preempt_count: bytes[1] & 1 == 1,
                ..Policy::default()
            };
            let plan = plan_of(&scene, &diagnosis, &policy);
            prop_assert!(plan.rung.is_some() != plan.actions.is_empty());
            prop_assert!(!plan.to_string().is_empty());
            prop_assert!(serde_json::to_string(&plan).is_ok());
        }
    }
}
