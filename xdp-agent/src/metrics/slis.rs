//! What health checks have said, as every component of Kubernetes counts it (component-base/metrics/prometheus/slis).

use std::fmt;

use prometheus_client::{
    encoding::text,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

/// Health checks of the metrics port, by path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Check {
    /// `/healthz`: the process answers.
    Healthz,
    /// `/livez`: the maps keep up with the objects.
    Livez,
    /// `/readyz`: everything is in place.
    Readyz,
}

impl Check {
    /// The labels by which a component of Kubernetes names it.
    const fn labels(self) -> [(&'static str, &'static str); 2] {
        match self {
            // As kube-proxy has it.
            Self::Healthz => [("name", "ping"), ("type", "healthz")],
            Self::Livez => [("name", "maps"), ("type", "livez")],
            Self::Readyz => [("name", "start"), ("type", "readyz")],
        }
    }
}

/// What health checks have said since the start.
#[derive(Clone, Debug, Default)]
pub struct Slis {
    last: Family<[(&'static str, &'static str); 2], Gauge>,
    all: Family<[(&'static str, &'static str); 3], Counter>,
}

impl Slis {
    /// Counts an answer.
    pub fn observe(&self, check: Check, is_good: bool) {
        let [name, kind] = check.labels();
        self.last.get_or_create(&[name, kind]).set(is_good.into());
        let status = if is_good { "success" } else { "error" };
        self.all.get_or_create(&[name, ("status", status), kind]).inc();
    }

    /// The text for Prometheus.
    ///
    /// # Errors
    /// When a metric cannot be written as text.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let mut registry = Registry::with_prefix("kubernetes");
        registry.register("healthcheck", "The result of the last health check", self.last.clone());
        registry.register("healthchecks", "The results of all health checks", self.all.clone());
        let mut text = String::new();
        text::encode(&mut text, &registry)?;
        Ok(text)
    }
}
