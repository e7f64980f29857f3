//! placeholder
pub(crate) fn spawn(
    _config: crate::handle::DeviceConfig,
) -> std::io::Result<(crate::DeviceHandle, std::sync::mpsc::Receiver<crate::Notice>)> {
    Err(std::io::Error::from(std::io::ErrorKind::Unsupported))
}
