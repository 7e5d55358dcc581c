//! What a diagnosis says, in words that every form of report uses. No layout.

use repair_image::{SourceFrame, base_name};

use crate::context::name as context_name;
use crate::{
    Confirmation, Diagnosis, Frame, FrameEffects, Held, Offender, ResourceKind, Trust, UnwindEnd,
};

/// The offender in one sentence.
pub(super) fn verdict(diagnosis: &Diagnosis) -> String {
    let at = |source: &Option<SourceFrame>| {
        source.as_ref().map(|source| format!(" ({})", place(source))).unwrap_or_default()
    };
    match &diagnosis.offender {
        Some(Offender::Driver { module, function, source }) => {
            format!("The driver {module} is at fault, in {function}(){}.", at(source))
        }
        Some(Offender::Process { pid, comm, function, source, .. }) => format!(
            "The kernel failed in {function}(){}, on behalf of the process {comm} (pid {pid}).",
            at(source)
        ),
        Some(Offender::Kernel { function, source }) => {
            format!("The core kernel is at fault, in {function}(){}.", at(source))
        }
        None => "Who is at fault could not be determined.".to_owned(),
    }
}

pub(super) fn described(frame: &Frame) -> String {
    let ip = frame.pc.ip();
    let mut said = match (&frame.function, frame.function_start) {
        (Some(name), Some(start)) => format!("{}+{:#x}", base_name(name), ip - start),
        (Some(name), None) => base_name(name).to_owned(),
        (None, _) => format!("{ip:#x}"),
    };
    if let Some(module) = &frame.module {
        said += &format!(" [{module}]");
    }
    said
}

pub(super) fn place(source: &SourceFrame) -> String {
    if source.line == 0 { source.file.clone() } else { format!("{}:{}", source.file, source.line) }
}

pub(super) fn trust(trust: Trust) -> &'static str {
    match trust {
        Trust::Context => "vCPU",
        Trust::SavedRegisters => "pt_regs",
        Trust::Cfi => "CFI",
        Trust::OrcAndCode => "ORC+code",
        Trust::Orc => "ORC",
        Trust::BadCall => "bad call",
    }
}

pub(super) fn end(end: &UnwindEnd) -> String {
    match end {
        UnwindEnd::UserMode => "user mode".to_owned(),
        UnwindEnd::Outermost => "outermost kernel frame".to_owned(),
        UnwindEnd::NoRow(at) => format!("unwinding ended: nothing is known of {at:#x}"),
        UnwindEnd::Unreadable(at) => format!("unwinding ended: the stack at {at:#x} is unreadable"),
        UnwindEnd::NotAdvancing(at) => {
            format!("unwinding ended: the frame at {at:#x} does not lead outward")
        }
        UnwindEnd::UnknownRegister(at) => {
            format!("unwinding ended: a register that {at:#x} needs is not known")
        }
        UnwindEnd::TooDeep => "unwinding ended: too many frames".to_owned(),
    }
}

pub(super) fn resource(kind: ResourceKind) -> &'static str {
    match kind {
        ResourceKind::Mutex => "mutex",
        ResourceKind::RwsemWrite => "rwsem (write)",
        ResourceKind::RwsemRead => "rwsem (read)",
        ResourceKind::Semaphore => "semaphore",
        ResourceKind::Spinlock => "spinlock",
        ResourceKind::SpinlockBh => "spinlock_bh",
        ResourceKind::SpinlockIrq => "spinlock_irq",
        ResourceKind::SpinlockIrqsave => "spinlock_irqsave",
        ResourceKind::ReadLock => "rwlock (read)",
        ResourceKind::WriteLock => "rwlock (write)",
        ResourceKind::Rcu => "RCU read side",
        ResourceKind::BottomHalves => "bottom halves off",
        ResourceKind::Preemption => "preemption off",
        ResourceKind::Interrupts => "interrupts off",
    }
}

/// Facts by name, those that are known.
pub(super) fn facts(diagnosis: &Diagnosis) -> Vec<(&'static str, String)> {
    let mut facts = vec![("signature", diagnosis.signature.clone())];
    if let Some(hook) = &diagnosis.hook {
        let said = format!("{}() on vCPU {}", hook.kind.function(), diagnosis.vcpu.0);
        facts.push(("caught at", said));
    }
    facts.extend(diagnosis.message.iter().map(|message| ("message", message.clone())));
    facts.push(("context", context(diagnosis)));
    facts.extend(task(diagnosis).map(|task| ("task", task)));
    facts
}

fn context(diagnosis: &Diagnosis) -> String {
    let context = &diagnosis.context;
    let mut said = format!("{} context", context_name(context.kind));
    if let Some(cpu) = context.cpu {
        said += &format!(", CPU {cpu}");
    }
    if context.idle {
        said += ", CPU was idle";
    }
    if let Some(count) = context.preempt_count {
        said += &format!(", preempt count {count:#010x}");
    }
    said += match context.interrupts_enabled {
        Some(true) => ", interrupts on",
        Some(false) => ", interrupts off",
        None => "",
    };
    if let Some(nesting) = context.rcu_nesting {
        said += &format!(", RCU nesting {nesting}");
    }
    said
}

fn task(diagnosis: &Diagnosis) -> Option<String> {
    let task = diagnosis.task.as_ref()?;
    let mut said = format!("{} (pid {}", task.comm, task.pid);
    if task.tgid != task.pid {
        said += &format!(", process {}", task.tgid);
    }
    said += ")";
    if task.kernel_thread {
        said += ", kernel thread";
    }
    if let Some(executable) = &task.executable {
        said += &format!(", executes {executable}");
    }
    if let Some(syscall) = &task.syscall {
        said += &format!(", in system call {syscall}");
    }
    Some(said)
}

/// What frames hold, one thing a line.
pub(super) fn effects(diagnosis: &Diagnosis, effects: &FrameEffects) -> Vec<String> {
    let mut lines: Vec<String> =
        effects.held.iter().map(|held| held_line(diagnosis, held)).collect();
    if lines.is_empty() {
        lines.push("nothing is held".to_owned());
    }
    if effects.preempt_delta != 0 {
        lines.push(format!("preempt count raised by {:#x}", effects.preempt_delta));
    }
    if effects.rcu_delta != 0 {
        lines.push(format!("RCU nesting raised by {}", effects.rcu_delta));
    }
    if !effects.undetermined.is_empty() {
        let frames: Vec<String> = effects.undetermined.iter().map(usize::to_string).collect();
        lines.push(format!("not determined for frame {}", frames.join(", ")));
    }
    lines
}

fn held_line(diagnosis: &Diagnosis, held: &Held) -> String {
    let lock = match (&held.name, held.lock) {
        (Some(name), Some(at)) => format!("{name} at {at:#x}"),
        (Some(name), None) => name.clone(),
        (None, Some(at)) => format!("{at:#x}"),
        (None, None) => String::new(),
    };
    let by = diagnosis.frames.get(held.frame).and_then(|frame| frame.function.as_deref());
    let by = base_name(by.unwrap_or("?"));
    let confirmed = match &held.confirmed {
        Confirmation::Confirmed => ", memory agrees".to_owned(),
        Confirmation::Contradicted { word } => format!(", memory contradicts ({word:#x})"),
        Confirmation::NotApplicable => String::new(),
        Confirmation::Unknown => ", not confirmed".to_owned(),
    };
    format!("{:<20} {lock} (frame {}, {by}){confirmed}", resource(held.kind), held.frame)
}
