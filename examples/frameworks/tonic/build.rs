//! Generates the service without a .proto file, so that no protoc is needed.

fn main() {
    let method = |name: &str, route: &str, streams: bool| {
        let method = tonic_build::manual::Method::builder().name(name).route_name(route);
        let method = if streams { method.server_streaming() } else { method };
        method.input_type("crate::Nothing").output_type("crate::Who").codec_path("tonic_prost::ProstCodec").build()
    };
    let service = tonic_build::manual::Service::builder()
        .package("demo")
        .name("Whoami")
        .method(method("ask", "Ask", false))
        .method(method("watch", "Watch", true))
        .build();
    tonic_build::manual::Builder::new().build_client(false).compile(&[service]);
}
