//! Port plus backend: in-flight table, pause, handover, swap; the data-plane thread
