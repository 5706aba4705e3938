//! VLANs and bonds in both address families, which not every kernel has.

use anyhow::Result;

use crate::layered::Machines;

#[test]
fn services_answer_by_a_vlan() -> Result<()> {
    let machines = Machines::new()?;
    for namespace in [&machines.node, &machines.far] {
        namespace.vlan("eth0.70", "eth0", 70)?;
    }
    machines.serve_by("eth0.70", "eth0.70")
}

#[test]
fn services_answer_by_a_vlan_within_a_vlan() -> Result<()> {
    let machines = Machines::new()?;
    for namespace in [&machines.node, &machines.far] {
        namespace.vlan("outer", "eth0", 9)?;
        namespace.vlan("inner", "outer", 5)?;
    }
    machines.serve_by("inner", "inner")
}

#[test]
fn services_answer_by_a_bond() -> Result<()> {
    let machines = Machines::new()?;
    machines.node.bond("bond0", "eth0")?;
    machines.serve_by("bond0", "eth0")
}
