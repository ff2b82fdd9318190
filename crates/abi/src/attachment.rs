//! What is attached to an interface, for the user side alone: what `show`, `status` and
//! `detach` need to know and the kernel does not. Each function that attaches for good
//! has a map ATTACHMENT with one [`Attachment`].

/// An attachment to an interface.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct Attachment {
    /// When, in seconds since 1970; 0 if it has not come that far.
    pub since: u64,
    /// The network namespace, by inode.
    pub namespace: u64,
    /// The interface's number.
    pub interface: u32,
    /// Where the program at ingress sits, of [`hook`].
    pub hook: u32,
    /// What holds the program at ingress, of [`held`].
    pub ingress: u32,
    /// What holds the program at egress, of [`held`].
    pub egress: u32,
    /// 1: the clsact qdisc was not there before.
    pub qdisc: u32,
    /// Zero.
    pub padding: u32,
    /// The interface's name at that time, ended by zeros.
    pub name: [u8; 16],
    /// Why this hook, ended by zeros.
    pub reason: [u8; 208],
}

/// Where a program sits.
pub mod hook {
    /// Native XDP.
    pub const XDP: u32 = 0;
    /// Generic XDP.
    pub const XDP_GENERIC: u32 = 1;
    /// TC ingress.
    pub const TC: u32 = 2;
}

/// What holds a program at its place.
pub mod held {
    /// There is none.
    pub const NOT: u32 = 0;
    /// A pinned link.
    pub const BY_LINK: u32 = 1;
    /// A netlink filter in a clsact qdisc.
    pub const BY_FILTER: u32 = 2;
}

crate::pod!(Attachment = 264);
