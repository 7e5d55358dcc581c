//! What a kernel says of its types: layouts of structures and prototypes of functions. The answers
//! only; where they come from (BTF, DWARF) is in `btf.rs` and `compile/`.

use serde::Serialize;

/// Where a member of a structure is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the start of the outermost structure.
    pub offset: u64,
    /// Size in bytes (of the whole array for arrays).
    pub size: u64,
    /// For bit-fields: first bit within the byte at `offset`, and number of bits.
    pub bits: Option<(u8, u8)>,
    /// Shape of its type.
    pub shape: TypeShape,
}

/// As much of a C type as deciding on a value of it needs.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TypeShape {
    /// `void`
    Void,
    /// An integer, `typedef`s in between kept: `ssize_t`, `__poll_t`, `vm_fault_t`.
    Int {
        /// Outermost typedef name, or the base type's name.
        name: String,
        /// Size in bytes.
        size: u8,
        /// Whether it is signed.
        signed: bool,
    },
    /// `bool`
    Bool,
    /// An enumeration.
    Enum {
        /// Outermost typedef name or tag: `irqreturn_t`, `hrtimer_restart`.
        name: String,
        /// Tag of the enumeration itself, without typedefs: `irqreturn`.
        tag: String,
        /// Size in bytes.
        size: u8,
    },
    /// A pointer.
    Pointer {
        /// Tag or typedef name of what it points to, `None` for `void *`, functions and the like.
        to: Option<String>,
    },
    /// A structure or union by value.
    Aggregate {
        /// Tag or typedef name.
        name: String,
        /// Size in bytes.
        size: u64,
    },
    /// Anything else (array, float, ...).
    Other,
}

/// Parameter of a function.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Parameter {
    /// Name; empty when the type information gives none.
    pub name: String,
    /// Type.
    pub shape: TypeShape,
}

/// Prototype of a function.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
pub struct Prototype {
    /// Return type.
    pub returns: TypeShape,
    /// Parameters, in order.
    pub parameters: Vec<Parameter>,
}

/// Types of one kernel, or of one module on top of it.
pub trait Types {
    /// Member `path` (`"thread.sp"`, through anonymous members and typedefs) of structure, union or
    /// typedef `structure`; `None` when this kernel has no such member.
    fn member(&self, structure: &str, path: &str) -> Option<Member>;

    /// Size in bytes of a structure, union or typedef.
    fn size_of(&self, name: &str) -> Option<u64>;

    /// Value of an enumerator, by its own name (`"IRQ_HANDLED"`).
    fn enumerator(&self, name: &str) -> Option<i64>;

    /// Prototype of a function by symbol name (compiler suffixes are ignored).
    fn prototype(&self, function: &str) -> Option<Prototype>;

    /// Prototype behind a function-pointer member: `("file_operations", "write")`.
    fn member_prototype(&self, structure: &str, path: &str) -> Option<Prototype>;

    /// Path and type of the innermost member of a structure at an offset in bytes; of a union, one
    /// that fits. `None` where layouts can be asked by name only.
    fn member_at(&self, _structure: &str, _offset: u64) -> Option<(String, TypeShape)> {
        None
    }
}
