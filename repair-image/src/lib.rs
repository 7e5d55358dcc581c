//! What must be known of a kernel to repair it after a crash, compiled ahead of time into one small
//! ELF file; and the payload that runs in the guest. Reads guest memory, never writes it.
#![deny(unsafe_code)]

mod btf;
mod build_id;
pub mod cfi;
pub mod compile;
mod damage;
mod debug_files;
mod debug_info;
mod draft;
mod error;
mod file;
mod guest_layer;
mod image;
mod kallsyms;
pub mod kernel_layer;
mod knowledge;
mod layout;
mod locate;
mod mmap;
mod modules;
pub mod orc;
mod patch_sites;
pub mod payload;
mod pristine;
mod record;
mod source;
mod symbol;
#[cfg(test)]
mod synth;
mod table;
mod types;
mod unwind;
mod variable;
mod variables;
mod verify;
mod vmcoreinfo;

pub use btf::Btf;
pub use build_id::{BuildId, ParseBuildIdError};
pub use damage::{Comparison, Damage, compare, compare_within};
pub use debug_files::{DebugFiles, ModuleFile, Search, build_id_path};
pub use debug_info::{
    Absent, Argument, DebugFile, DebugInfo, FrameState, FrameVariable, Held, InForce, ValueKind,
    ValueType,
};
pub use error::Error;
pub use guest_layer::{
    Gate, GuestLayer, KernelFacts, KernelText, PageHashes, PageKind, without_files,
};
pub use image::{Location, Module, Placement, RepairImage};
pub use kallsyms::{KallsymsTables, KernelSymbol};
pub use kernel_layer::{KernelLayer, SectionInfo};
pub use knowledge::{Knowledge, KnowledgeParts};
pub use locate::{ConfirmedBy, FoundBy, Located, locate, locate_without_files};
pub use mmap::MappedFile;
pub use modules::{
    LoadedModule, ModuleKey, ModuleReader, ModuleState, btf_of_modules, knowledge_from_memory,
};
pub use orc::OrcLayout;
pub use patch_sites::{PatchSites, SiteKind};
pub use pristine::{Pristine, PristineMemory, PristineRun};
pub use source::{SourceFrame, SourceRef};
pub use symbol::{Symbol, SymbolKind, base_name};
pub use types::{Member, Parameter, Prototype, TypeShape, Types};
pub use unwind::{CfaRule, FrameKind, RowSource, SavedRule, UnwindRow};
pub use variable::{Variable, VariableLocation};
pub use verify::{DifferingPage, Verification, verify};
pub use vmcoreinfo::Vmcoreinfo;
