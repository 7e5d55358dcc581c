//! Diagnoses of the fake kernel: what a crash there would be found to be, and what no crash would be. No test itself.

use diagnose::{
    Boundary, Confirmation, Context, CrashClass, Diagnosis, ExecutionContext, Frame, FrameEffects,
    Held, Offender, ResourceKind, Task, Trust, UnwindEnd,
};
use guest::{CodeAddress, GuestVirt, Hook, HookKind, Reg, Registers, Vcpu};
use repair_image::TypeShape;

use super::{DATA, MODULE_TEXT, PREEMPT_COUNT, Scene, TEXT, int, prototype};

/// Effects of frame 1 holding these, all confirmed.
pub(crate) fn effects(kinds: &[ResourceKind]) -> FrameEffects {
    let mut effects = FrameEffects::default();
    for (index, &kind) in kinds.iter().enumerate() {
        effects.preempt_delta += crate::counts::preempt_share(kind);
        effects.rcu_delta += i64::from(kind == ResourceKind::Rcu);
        let has_lock = !matches!(
            kind,
            ResourceKind::Rcu
                | ResourceKind::BottomHalves
                | ResourceKind::Preemption
                | ResourceKind::Interrupts
        );
        effects.held.push(Held {
            kind,
            lock: has_lock.then(|| DATA + 0x800 + index as u64 * 64),
            name: has_lock.then(|| format!("lock_{index}")),
            frame: 1,
            taken_at: MODULE_TEXT + 0x20,
            confirmed: if has_lock { Confirmation::Confirmed } else { Confirmation::NotApplicable },
            saved_interrupts: None,
        });
    }
    effects
}

/// A context of CPU 0.
pub(crate) fn context(kind: ExecutionContext, preempt_count: u32) -> Context {
    Context {
        kind,
        cpu: Some(0),
        preempt_count: Some(preempt_count),
        preempt_count_at: Some(PREEMPT_COUNT),
        interrupts_enabled: Some(true),
        rcu_nesting: Some(0),
        idle: false,
    }
}

impl Scene {
    /// A device whose packets the driver's entry sends, in a register of the caller; gives its address.
    pub(crate) fn sends_packets(&mut self, diagnosis: &mut Diagnosis, features: u64) -> GuestVirt {
        let (device, operations) = (DATA + 0x600, DATA + 0x680);
        self.set_member("net_device", "netdev_ops", device, operations.0);
        self.set_member("net_device", "features", device, features);
        self.set_member("net_device_ops", "ndo_start_xmit", operations, MODULE_TEXT.0);
        let caller = diagnosis.boundary.as_ref().map_or(0, |boundary| boundary.frame);
        diagnosis.frames[caller].registers.set(Reg::Rbx, device.0);
        device
    }

    /// A NULL dereference in `toy_write`, called by `vfs_write`, that holds nothing.
    pub(crate) fn diagnosis(&self) -> Diagnosis {
        let mut caller = frame("vfs_write", None, CodeAddress::Return(self.return_address));
        caller.registers = Registers::unknown()
            .with(Reg::Rip, self.return_address.0)
            .with(Reg::Rsp, self.boundary_rsp.0);
        for (index, reg) in Reg::CALLEE_SAVED.into_iter().enumerate() {
            caller.registers.set(reg, 0x10 + index as u64);
        }
        let mut entry = frame("toy_write", Some("toy"), CodeAddress::Exact(MODULE_TEXT + 8));
        entry.cfa = Some(self.boundary_rsp);
        entry.registers.set(Reg::Rsp, self.boundary_rsp.offset(-64).0);
        let hook = frame("oops_begin", None, CodeAddress::Exact(TEXT + 0x1000));
        let held = FrameEffects { interrupts_before: Some(true), ..FrameEffects::default() };
        Diagnosis {
            hook: Some(Hook { kind: HookKind::OopsBegin, at: TEXT + 0x1000 }),
            vcpu: Vcpu(0),
            class: Some(CrashClass::NullDereference),
            title: "BUG: kernel NULL pointer dereference in toy_write".to_owned(),
            signature: "null_dereference:toy_write:vfs_write".to_owned(),
            context: context(ExecutionContext::Task, 0x8000_0000),
            task: Some(self.user_task()),
            frames: vec![hook, entry, caller],
            fault_frame: 1,
            fault_regs_at: Some(self.regs_at),
            unwind_end: UnwindEnd::UserMode,
            offender: Some(Offender::Driver {
                module: "toy".to_owned(),
                function: "toy_write".to_owned(),
                source: None,
            }),
            evidence: Vec::new(),
            explanation: None,
            boundary: Some(Boundary {
                frame: 2,
                entry: 1,
                function: "vfs_write".to_owned(),
                prototype: Some(prototype(int("ssize_t", 8, true))),
                effects: held,
                outer: FrameEffects::default(),
            }),
            core_exits: Vec::new(),
            damage: Vec::new(),
            queued: None,
            all_effects: Some(FrameEffects::default()),
            message: None,
        }
    }

    /// A NULL dereference in the core kernel on behalf of a process.
    pub(crate) fn core_diagnosis(&self) -> Diagnosis {
        let mut diagnosis = self.diagnosis();
        diagnosis.boundary = None;
        diagnosis.frames[1].module = None;
        diagnosis.frames[1].function = Some("do_something".to_owned());
        diagnosis.offender = Some(Offender::Process {
            pid: 300,
            tgid: 300,
            comm: "worker".to_owned(),
            function: "do_something".to_owned(),
            source: None,
        });
        diagnosis
    }

    pub(crate) fn effects(&self, kinds: &[ResourceKind]) -> FrameEffects {
        effects(kinds)
    }

    /// Lets the driver's frame hold these, with counts that agree.
    pub(crate) fn hold(&self, diagnosis: &mut Diagnosis, kinds: &[ResourceKind]) {
        let mut held = effects(kinds);
        held.interrupts_before = Some(true);
        let count = 0x8000_0000_u32 + u32::try_from(held.preempt_delta).expect("small");
        diagnosis.context.preempt_count = Some(count);
        diagnosis.context.rcu_nesting = i32::try_from(held.rcu_delta).ok();
        diagnosis.boundary.as_mut().expect("boundary").effects = held;
    }

    /// The same crash in a timer that interrupted the idle task.
    pub(crate) fn over_idle(&self, diagnosis: &mut Diagnosis) {
        diagnosis.context = context(ExecutionContext::Softirq, 0x8000_0101);
        diagnosis.context.idle = true;
        let boundary = diagnosis.boundary.as_mut().expect("boundary");
        boundary.function = "call_timer_fn".to_owned();
        boundary.prototype = Some(prototype(TypeShape::Void));
    }

    fn user_task(&self) -> Task {
        Task {
            at: self.task,
            comm: "worker".to_owned(),
            pid: 300,
            tgid: 300,
            kernel_thread: false,
            executable: Some("worker".to_owned()),
            syscall: Some("write (1)".to_owned()),
        }
    }
}

fn frame(function: &str, module: Option<&str>, pc: CodeAddress) -> Frame {
    Frame {
        pc,
        cfa: None,
        registers: Registers::unknown(),
        trust: Trust::Cfi,
        module: module.map(str::to_owned),
        function: Some(function.to_owned()),
        function_start: None,
        source: Vec::new(),
        saved_at: None,
    }
}

/// A diagnosis in which anything may be wrong: numbers from `words`, choices from `bytes`.
pub(crate) fn wild_diagnosis(
    scene: &Scene,
    words: &[u64],
    bytes: &[u8],
    deltas: (i64, i64, i64, i64),
) -> Diagnosis {
    let word = |index: usize| words.get(index).copied().unwrap_or(0);
    let byte = |index: usize| bytes.get(index).copied().unwrap_or(0);
    let choose = |index: usize, of: u8| byte(index) % of;
    let mut diagnosis = if choose(2, 4) == 0 { scene.core_diagnosis() } else { scene.diagnosis() };
    let kinds = [
        ResourceKind::Mutex,
        ResourceKind::SpinlockBh,
        ResourceKind::Rcu,
        ResourceKind::Preemption,
        ResourceKind::RwsemRead,
    ];
    let mut held = effects(&kinds[..usize::from(choose(3, 6)).min(kinds.len())]);
    if choose(4, 2) == 0 {
        (held.preempt_delta, held.rcu_delta) = (deltas.0, deltas.1);
    }
    for (index, held) in held.held.iter_mut().enumerate() {
        match choose(5 + index, 5) {
            0 => held.lock = Some(GuestVirt(word(index))),
            1 => held.confirmed = Confirmation::Unknown,
            2 => held.frame = word(index) as usize,
            _ => {}
        }
    }
    held.interrupts_before = [None, Some(true), Some(false)][usize::from(choose(10, 3))];
    let outer = FrameEffects {
        preempt_delta: if choose(11, 3) == 0 { deltas.2 } else { 0 },
        rcu_delta: if choose(12, 3) == 0 { deltas.3 } else { 0 },
        ..FrameEffects::default()
    };
    if let Some(boundary) = diagnosis.boundary.as_mut() {
        boundary.effects = held.clone();
        boundary.outer = outer;
        if choose(13, 4) == 0 {
            (boundary.frame, boundary.entry) = (word(5) as usize, word(6) as usize);
        }
        if choose(14, 3) == 0 {
            boundary.prototype = None;
        }
    }
    diagnosis.all_effects = Some(held);
    let kinds = [
        ExecutionContext::Task,
        ExecutionContext::Softirq,
        ExecutionContext::Hardirq,
        ExecutionContext::Nmi,
    ];
    diagnosis.context = context(kinds[usize::from(choose(15, 4))], word(7) as u32 & 0x8000_0703);
    diagnosis.context.idle = choose(16, 2) == 0;
    diagnosis.context.cpu = Some(usize::from(choose(17, 3)));
    if choose(18, 3) == 0 {
        diagnosis.fault_frame = word(8) as usize;
        diagnosis.fault_regs_at = Some(GuestVirt(word(9)));
    }
    if choose(19, 3) == 0
        && let Some(frame) = diagnosis.frames.last_mut()
    {
        frame.registers.set(Reg::Rsp, word(10));
        frame.pc = CodeAddress::Return(GuestVirt(word(11)));
    }
    if choose(20, 4) == 0
        && let Some(task) = diagnosis.task.as_mut()
    {
        task.at = GuestVirt(word(12));
    }
    diagnosis
}
