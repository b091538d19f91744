//! Reads a server's certificate and key for rustls.

use std::error::Error;

use tokio_rustls::rustls::pki_types::{pem::PemObject, CertificateDer, PrivateKeyDer};
pub use tokio_rustls::rustls::{server::ProducesTickets, ServerConfig};
pub use tokio_rustls::{server::TlsStream, TlsAcceptor};

/// Reads two PEM files. The connection uses the first of the `protocols` that the client also supports (ALPN).
pub fn config(cert: &str, key: &str, protocols: &[&str]) -> Result<ServerConfig, Box<dyn Error>> {
    let chain = CertificateDer::pem_file_iter(cert)?.collect::<Result<Vec<_>, _>>()?;
    let key = PrivateKeyDer::from_pem_file(key)?;
    let mut config = ServerConfig::builder().with_no_client_auth().with_single_cert(chain, key)?;
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.as_bytes().to_vec()).collect();
    Ok(config)
}
