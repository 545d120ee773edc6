// swift-tools-version: 6.0
// The language model "@NAME@" as a Swift package; this whole folder is the package.
import PackageDescription

let package = Package(
    name: "@NAME@",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [.library(name: "@MODULE@", targets: ["@MODULE@"])],
    dependencies: [
        .package(url: "https://github.com/huggingface/swift-transformers", from: "1.0.0")
    ],
    targets: [
        .target(
            name: "@MODULE@",
            dependencies: [.product(name: "Tokenizers", package: "swift-transformers")],
            path: ".",
            sources: ["ios/Sources"],
            resources: [.copy("@ENTRY@"), .copy("ios/tokenizer")]
        ),
        .testTarget(
            name: "@MODULE@Tests",
            dependencies: ["@MODULE@"],
            path: ".",
            sources: ["ios/Tests"],
            resources: [.copy("golden")]
        ),
    ],
    swiftLanguageModes: [.v5]
)
