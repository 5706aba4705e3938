//! What kernels answer when they refuse, and what it is taken for.
//!
//! The words are those in the images and modules of Debian's kernels 6.1.0-56, 6.12.117 and 7.3.4 (amd64 and arm64); the
//! number is what the source returns beside them. Where a driver prefixes its words with its name, they begin with it.
//! A driver that says why in the kernel's log alone gives a number and no words.

use super::{Refusal, RefusalKind};
use crate::devices::Mode;

/// A refusal: the file of the kernel that it comes from, the kernels that have it, words, errno, MTU, and its kind.
type Recorded = (&'static str, &'static str, &'static str, i32, u32, RefusalKind);

const RECORDED: [Recorded; 59] = {
    use RefusalKind::{Busy, Gone, Memory, Mtu, Offloads, Other, Permission, Queues, Unsupported};
    use libc::{
        E2BIG, EACCES, EBUSY, EEXIST, EINVAL, ENODEV, ENOMEM, ENOSPC, ENOTCONN, EOPNOTSUPP, EPERM, ERANGE,
    };
    const CORE: &str = "net/core/dev.c";
    const ALL: &str = "6.1 6.12 7.3";
    const NEW: &str = "6.12 7.3";
    const LAST: &str = "7.3";
    [
        // Another program.
        (CORE, ALL, "XDP program already attached", EBUSY, 1500, Busy),
        (CORE, ALL, "Native and generic XDP can't be active at the same time", EEXIST, 1500, Busy),
        (CORE, ALL, "Can't replace active BPF XDP link", EBUSY, 1500, Busy),
        (CORE, ALL, "Can't replace active XDP program with BPF link", EBUSY, 1500, Busy),
        (CORE, ALL, "Active program does not match expected", EEXIST, 1500, Busy),
        (CORE, ALL, "Cannot attach when an upper device already has a program", EEXIST, 1500, Busy),
        (CORE, ALL, "", EBUSY, 9000, Busy),
        // What a device is used for besides.
        (CORE, LAST, "unable to install XDP to device using tcp-data-split", EBUSY, 1500, Offloads),
        (CORE, NEW, "unable to install XDP to device using memory provider", EBUSY, 1500, Other),
        // What a process or a device is not.
        ("kernel/bpf/syscall.c", ALL, "", EPERM, 1500, Permission),
        ("net/core/rtnetlink.c", ALL, "", EACCES, 1500, Permission),
        (CORE, ALL, "", ENODEV, 1500, Gone),
        (CORE, ALL, "Underlying driver does not support XDP in native mode", EOPNOTSUPP, 1500, Unsupported),
        (CORE, ALL, "Underlying driver does not support XDP in native mode", EOPNOTSUPP, 9000, Unsupported),
        (BONDING, ALL, "Slave device does not support XDP", EOPNOTSUPP, 1500, Unsupported),
        (BONDING, ALL, "No native XDP support for the current bonding mode", EOPNOTSUPP, 9000, Unsupported),
        (VETH, ALL, "veth: Cannot set XDP when peer is detached", ENOTCONN, 1500, Other),
        // Frames longer than a buffer.
        (VIRTIO, "6.1", "virtio_net: MTU too large to enable XDP", EINVAL, 3818, Mtu),
        (VIRTIO, NEW, "virtio_net: MTU too large to enable XDP without frags", EINVAL, 3507, Mtu),
        (VETH, ALL, "veth: Peer MTU is too large to set XDP", ERANGE, 9000, Mtu),
        (IGB, ALL, "igb: The RX buffer size is too small for the frame size", EINVAL, 3000, Mtu),
        (VMXNET3, NEW, "vmxnet3: MTU 9000 too large for XDP", EOPNOTSUPP, 9000, Mtu),
        (ENA, ALL, ENA_MTU, EINVAL, 9001, Mtu),
        (GVE, LAST, "gve: XDP is not supported for mtu 8896.", EOPNOTSUPP, 8896, Mtu),
        (HYPERV, ALL, "hv_netvsc: XDP: mtu too large", EOPNOTSUPP, 9000, Mtu),
        (MANA, ALL, "mana: XDP: mtu too large", EOPNOTSUPP, 9000, Mtu),
        (I40E, "6.1", "i40e: MTU too large to enable XDP", EINVAL, 9000, Mtu),
        (
            I40E,
            NEW,
            "i40e: MTU too large for linear frames and XDP prog does not support frags",
            EINVAL,
            9000,
            Mtu,
        ),
        (ICE, "6.1", "ice: MTU too large for loading XDP", EOPNOTSUPP, 9000, Mtu),
        (
            ICE,
            NEW,
            "ice: MTU is too large for linear frames and XDP prog does not support frags",
            EOPNOTSUPP,
            9000,
            Mtu,
        ),
        (NFP, ALL, "nfp: MTU too large w/ XDP enabled", EINVAL, 9000, Mtu),
        (IONIC, NEW, "ionic: MTU is too large for XDP without frags support", EINVAL, 9000, Mtu),
        (ATLANTIC, ALL, "atlantic: prog does not support XDP frags", EOPNOTSUPP, 9000, Mtu),
        (NETSEC, ALL, "netsec: Jumbo frames not supported on XDP", EOPNOTSUPP, 1501, Mtu),
        (IGC, ALL, "igc: Jumbo frames not supported", EOPNOTSUPP, 1501, Mtu),
        (STMMAC, ALL, "stmmac: Jumbo frames not supported", EOPNOTSUPP, 1501, Mtu),
        // In the log: "MTU 9000 larger than 3500 without XDP frag support."
        ("drivers/net/ethernet/broadcom/bnxt/bnxt_xdp.c", ALL, "", EOPNOTSUPP, 9000, Mtu),
        // "Jumbo frames not yet supported with XDP, current MTU 9000."
        ("drivers/net/ethernet/cavium/thunder/nicvf_main.c", ALL, "", EOPNOTSUPP, 9000, Mtu),
        // "MTU(9000) > 3498, too big for an XDP program not aware of multi buffer"
        (MLX5, ALL, "", EINVAL, 9000, Mtu),
        ("drivers/net/ethernet/intel/ixgbe/ixgbe_main.c", ALL, "", EINVAL, 9000, Mtu),
        (CORE, ALL, "", ERANGE, 9000, Mtu),
        (CORE, ALL, "", E2BIG, 9000, Mtu),
        // What a device does to frames before.
        (VIRTIO, ALL, VIRTIO_OFFLOADS, EOPNOTSUPP, 1500, Offloads),
        (HYPERV, ALL, "hv_netvsc: XDP: not support LRO", EOPNOTSUPP, 1500, Offloads),
        (GVE, LAST, "gve: XDP is not supported when HW-GRO is on.", EOPNOTSUPP, 1460, Offloads),
        (
            GVE,
            LAST,
            "gve: XDP is not supported when header-data split is enabled.",
            EOPNOTSUPP,
            1460,
            Offloads,
        ),
        // Queues.
        (VETH, ALL, VETH_QUEUES, ENOSPC, 1500, Queues),
        (ENA, ALL, ENA_QUEUES, EINVAL, 1500, Queues),
        (GVE, LAST, GVE_QUEUES, EINVAL, 1460, Queues),
        (ICE, ALL, "ice: Not enough Tx resources for XDP", ENOMEM, 1500, Queues),
        (
            IDPF,
            LAST,
            "idpf: No Tx queues available for XDP, please decrease the number of regular SQs",
            ENOSPC,
            1500,
            Queues,
        ),
        (NFP, ALL, "nfp: Insufficient number of TX rings w/ XDP enabled", EINVAL, 1500, Queues),
        (
            ENETC,
            NEW,
            "fsl_enetc_core: Reserving 2 XDP TXQs leaves under 2 for stack (total 2)",
            EBUSY,
            1500,
            Queues,
        ),
        // Memory.
        (VETH, ALL, "veth: Setup for XDP failed", ENOMEM, 1500, Memory),
        (VMXNET3, NEW, "vmxnet3: failed to re-create rx queues for XDP.", EOPNOTSUPP, 1500, Memory),
        (ICE, ALL, "ice: Setting up XDP Tx resources failed", ENOMEM, 1500, Memory),
        (MANA, LAST, "mana: XDP: Insufficient memory for tx/rx re-config", ENOMEM, 1500, Memory),
        // Whatever else it is: the words say it.
        (
            VIRTIO,
            ALL,
            "virtio_net: XDP expects header/data in single page, any_header_sg required",
            EINVAL,
            1500,
            Other,
        ),
        (MLX5, ALL, "", EINVAL, 1500, Other),
    ]
};

const ATLANTIC: &str = "drivers/net/ethernet/aquantia/atlantic/aq_main.c";
const BONDING: &str = "drivers/net/bonding/bond_main.c";
const ENA: &str = "drivers/net/ethernet/amazon/ena/ena_xdp.c";
const ENETC: &str = "drivers/net/ethernet/freescale/enetc/enetc.c";
const GVE: &str = "drivers/net/ethernet/google/gve/gve_main.c";
const HYPERV: &str = "drivers/net/hyperv/netvsc_bpf.c";
const I40E: &str = "drivers/net/ethernet/intel/i40e/i40e_main.c";
const ICE: &str = "drivers/net/ethernet/intel/ice/ice_main.c";
const IDPF: &str = "drivers/net/ethernet/intel/idpf/xdp.c";
const IGB: &str = "drivers/net/ethernet/intel/igb/igb_main.c";
const IGC: &str = "drivers/net/ethernet/intel/igc/igc_xdp.c";
const IONIC: &str = "drivers/net/ethernet/pensando/ionic/ionic_lif.c";
const MANA: &str = "drivers/net/ethernet/microsoft/mana/mana_bpf.c";
const MLX5: &str = "drivers/net/ethernet/mellanox/mlx5/core/en_main.c";
const NETSEC: &str = "drivers/net/ethernet/socionext/netsec.c";
const NFP: &str = "drivers/net/ethernet/netronome/nfp/nfp_net_common.c";
const STMMAC: &str = "drivers/net/ethernet/stmicro/stmmac/stmmac_xdp.c";
const VETH: &str = "drivers/net/veth.c";
const VIRTIO: &str = "drivers/net/virtio_net.c";
const VMXNET3: &str = "drivers/net/vmxnet3/vmxnet3_xdp.c";

const ENA_MTU: &str = "ena: Failed to set xdp program, the current MTU is larger than the maximum allowed MTU. Check the dmesg \
                       for more info";
const ENA_QUEUES: &str = "ena: Failed to set xdp program, there is no enough space for allocating XDP queues, Check the dmesg for \
                          more info";
const GVE_QUEUES: &str = "gve: XDP load failed: The number of configured RX queues should be equal to the number of configured TX \
                          queues and the number of configured RX/TX queues should be less than or equal to half the maximum \
                          number of RX/TX queues";
const VETH_QUEUES: &str = "veth: XDP expects number of rx queues not less than peer tx queues";
const VIRTIO_OFFLOADS: &str =
    "virtio_net: Can't set XDP while host is implementing GRO_HW/CSUM, disable GRO_HW/CSUM first";

#[test]
fn recorded_refusals_are_classified() {
    let mut wrong = Vec::new();
    for (source, kernels, words, errno, mtu, kind) in RECORDED {
        let text = Some(words.to_owned()).filter(|text| !text.is_empty());
        let refusal = Refusal::new(Mode::Native, errno, text, mtu);
        if refusal.kind != kind {
            wrong.push(format!("{source} ({kernels}): {refusal}: not {kind:?}"));
        }
        assert!(!refusal.remedy().is_empty());
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
