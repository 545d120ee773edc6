// swift-tools-version: 6.0
// The @KIND@ "@NAME@" as a Swift package; this whole folder is the package.
import PackageDescription

let package = Package(
    name: "@NAME@",
    platforms: [.iOS(.v18), .macOS(.v15)],
    products: [.library(name: "@MODULE@", targets: ["@MODULE@"])],@PACKAGES@
    targets: [
        .target(
            name: "@MODULE@",@PRODUCTS@
            path: ".",
            sources: ["ios/Sources"],
            resources: [@ENTRIES@@TOKENIZER@@LABELS@]
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
