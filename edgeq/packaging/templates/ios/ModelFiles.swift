import CoreML
import Foundation
#if os(iOS)
import os
#endif

/// Why the model cannot be used now.
public enum ModelError: Error, CustomStringConvertible {
    /// The app may not take so much memory now.
    case notEnoughMemory(neededBytes: Int, availableBytes: Int)
    /// A file of the package is not where it should be.
    case missing(String)
    /// The prompt has more tokens than the model has room for.
    case tooLong(tokens: Int, room: Int)

    public var description: String {
        switch self {
        case .notEnoughMemory(let needed, let available):
            return "the model needs \(needed >> 20) MiB of memory, and \(available >> 20) MiB are left"
        case .missing(let name):
            return "\(name) is missing from the app"
        case .tooLong(let tokens, let room):
            return "the prompt has \(tokens) tokens, and there is room for \(room)"
        }
    }
}

/// The model's files in the app, and whether there is memory for it.
enum ModelFiles {
    /// Memory that the app may still take; nil on systems that set no limit.
    static func availableBytes() -> Int? {
        #if os(iOS) && !targetEnvironment(simulator)
        return Int(os_proc_available_memory())
        #else
        return nil
        #endif
    }

    /// A file or folder of the package.
    static func resource(_ name: String) throws -> URL {
        let url = Bundle.module.bundleURL.appending(path: name)
        if FileManager.default.fileExists(atPath: url.path) {
            return url
        }
        guard let found = Bundle.module.url(forResource: name, withExtension: nil) else {
            throw ModelError.missing(name)
        }
        return found
    }

    /// The model as Core ML runs it: compiled on the device once, and kept for the next start.
    ///
    /// - Parameter keep: digests of the models of this version of the app.
    static func compiled(_ name: String, digest: String, keep: [String]) async throws -> URL {
        let caches = try FileManager.default.url(
            for: .cachesDirectory, in: .userDomainMask, appropriateFor: nil, create: true)
        let folder = caches.appending(path: "@NAME@")
        let place = folder.appending(path: "\(digest).mlmodelc")
        if FileManager.default.fileExists(atPath: place.path) {
            return place
        }
        let made = try await MLModel.compileModel(at: try resource(name))
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        // compiled versions of older models go, so that they do not pile up
        let known = keep.map { "\($0).mlmodelc" }
        for old in try FileManager.default.contentsOfDirectory(atPath: folder.path)
        where !known.contains(old) {
            try? FileManager.default.removeItem(at: folder.appending(path: old))
        }
        try FileManager.default.moveItem(at: made, to: place)
        return place
    }
}
