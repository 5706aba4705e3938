//! The cases of `bench prog`, and what each may cost.

/// What an established packet of IPv6 may cost, in terms of IPv4: its keys and addresses are four times as long.
const V6_MAX: f64 = 1.25;

/// What a case may cost over `drop`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Budget {
    Nanoseconds(f64),
    /// Times what another case costs.
    Times(f64, Case),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Case {
    Drop,
    Limit,
    Forward,
    Reply,
    Stranger,
    NewFlow,
    LimitV6,
    ForwardV6,
    ReplyV6,
    StrangerV6,
    NewFlowV6,
    MoveHead,
    TunnelLimit,
    Tunnel,
}

impl Case {
    /// Those of direct server return, in a run of their own: their frames grow, and their flows have one entry each.
    pub(super) const DIRECT: [Self; 4] = [Self::Drop, Self::MoveHead, Self::TunnelLimit, Self::Tunnel];

    pub(super) const TRANSLATED: [Self; 11] = [
        Self::Drop,
        Self::Limit,
        Self::Forward,
        Self::Reply,
        Self::Stranger,
        Self::NewFlow,
        Self::LimitV6,
        Self::ForwardV6,
        Self::ReplyV6,
        Self::StrangerV6,
        Self::NewFlowV6,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Drop => "drop",
            Self::Limit => "limit",
            Self::Forward => "established, forward",
            Self::Reply => "established, reply",
            Self::Stranger => "not ours",
            Self::NewFlow => "new flow",
            Self::LimitV6 => "IPv6: limit",
            Self::ForwardV6 => "IPv6: established, forward",
            Self::ReplyV6 => "IPv6: established, reply",
            Self::StrangerV6 => "IPv6: not ours",
            Self::NewFlowV6 => "IPv6: new flow",
            Self::MoveHead => "room in front, and back",
            Self::TunnelLimit => "limit of a tunnel",
            Self::Tunnel => "established, tunnelled",
        }
    }

    /// What it may cost over `drop`.
    pub(super) fn budget(self) -> Option<Budget> {
        match self {
            Self::Drop
            | Self::Limit
            | Self::LimitV6
            | Self::NewFlowV6
            | Self::MoveHead
            | Self::TunnelLimit => None,
            Self::Tunnel => Some(Budget::Times(1.3, Self::TunnelLimit)),
            Self::Forward | Self::Reply => Some(Budget::Times(1.5, Self::Limit)),
            Self::ForwardV6 => Some(Budget::Times(V6_MAX, Self::Forward)),
            Self::ReplyV6 => Some(Budget::Times(V6_MAX, Self::Reply)),
            Self::Stranger | Self::StrangerV6 => Some(Budget::Nanoseconds(25.0)),
            Self::NewFlow => Some(Budget::Nanoseconds(600.0)),
        }
    }

    /// Whether its frames grow, and the wrapper shrinks them again.
    pub(super) fn grows(self) -> bool {
        matches!(self, Self::MoveHead | Self::TunnelLimit | Self::Tunnel)
    }

    /// What the program must answer, so that a case cannot measure a path it does not mean.
    pub(super) fn answer(self) -> u32 {
        const XDP_DROP: u32 = 1;
        const XDP_PASS: u32 = 2;
        const XDP_TX: u32 = 3;
        match self {
            Self::Drop | Self::MoveHead => XDP_DROP,
            Self::Stranger | Self::StrangerV6 => XDP_PASS,
            Self::Limit
            | Self::LimitV6
            | Self::Forward
            | Self::Reply
            | Self::NewFlow
            | Self::ForwardV6
            | Self::ReplyV6
            | Self::NewFlowV6
            | Self::TunnelLimit
            | Self::Tunnel => XDP_TX,
        }
    }
}
